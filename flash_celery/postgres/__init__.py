"""Talk to a PostgreSQL server: connections, the replication stream, the catalog, slots."""

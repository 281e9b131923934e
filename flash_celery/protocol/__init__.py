"""PostgreSQL's logical replication protocol: bytes in, values out, no I/O."""

"""Set PostgreSQL up: publications, replica identities, and the checks that come first."""

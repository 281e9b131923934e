"""A database backend that makes a password for each connection, as those for tokens do."""

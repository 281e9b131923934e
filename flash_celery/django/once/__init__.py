"""The Django app that creates the table of `once=` with a migration."""

"""PostgreSQL's text to Python values, and how values compare."""

"""`where=`: parse it, evaluate it on a row, and express it in SQL."""

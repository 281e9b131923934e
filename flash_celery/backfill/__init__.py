"""Rows that are there already: read in chunks, and put into their place in the stream."""

"""The alternatives, each a program: `python -m benchmarks.rivals.…`."""

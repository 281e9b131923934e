"""What one would use instead, each a program: `python -m benchmarks.rivals.…`."""

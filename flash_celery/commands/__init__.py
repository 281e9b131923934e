"""What each `flash` command does. Their options and output are in `cli`."""

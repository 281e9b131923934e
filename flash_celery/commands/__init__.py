"""What each `flash` command does; `cli` has their options and output."""

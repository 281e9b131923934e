"""What a replication worker shows of itself; imported where `flash_http` is set."""

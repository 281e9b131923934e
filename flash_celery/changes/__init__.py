"""What a handler receives, and its wire format."""

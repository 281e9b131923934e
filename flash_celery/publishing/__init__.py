"""Messages to the broker, on a thread of its own."""

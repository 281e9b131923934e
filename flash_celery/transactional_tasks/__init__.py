"""Tasks that a transaction carries: its commit enqueues them."""

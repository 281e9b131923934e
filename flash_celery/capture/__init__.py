"""WAL to rows of committed transactions, and rows to deliveries."""

"""The replication worker: the process that wires capture to publishing."""

"""Status page, metrics and probes of a replication worker; imported if `flash_http` is set."""

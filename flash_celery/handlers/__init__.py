"""`@on_change` and `@on_message`: how handlers are declared, and read back from an app's tasks."""

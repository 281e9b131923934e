"""`@on_change` and `@on_message`: declare handlers, and read the declarations of an app's tasks."""

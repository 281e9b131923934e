"""How Celery workers handle the changes of ordered handlers: lane by lane, one after another."""

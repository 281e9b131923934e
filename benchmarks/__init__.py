"""`make bench`: measure flash-celery and its alternatives."""

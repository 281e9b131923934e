"""`make bench`: what flash-celery does in a second, beside what else could be used."""

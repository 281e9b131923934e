"""Deliveries to Celery task messages."""

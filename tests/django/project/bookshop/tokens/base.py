"""The backend of Django's PostgreSQL, with a number as its password."""

from itertools import count

from django.db.backends.postgresql import base

numbers = count(1)


class DatabaseWrapper(base.DatabaseWrapper):
    """A connection whose parameters have another password each time."""

    def get_connection_params(self):
        return {**super().get_connection_params(), "password": f"token {next(numbers)}"}

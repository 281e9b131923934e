"""Log records as JSON, one object a line, for whoever collects them."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone

#: What every record has; the rest was given as `extra` by who logged it.
_OWN = set(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime"}
#: What Celery's own loggers give.
_CELERY = {"data"}


class JsonFormatter(logging.Formatter):
    """`time` (UTC), `level`, `logger`, `message`, `source`, what the record has of its own such as
    `lsn`, `table` or `slot`, and `exception`, a traceback."""

    def __init__(self, source: str = "") -> None:
        super().__init__()
        self._source = source

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        own = {k: v for k, v in vars(record).items() if k not in _OWN | _CELERY}
        said = fields(record.created, record.levelname, record.name, record.getMessage())
        said |= {"source": self._source} if self._source else {}
        said |= {name: value for name, value in own.items() if name not in said}
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return line(said)


def fields(created: float, level: str, logger: str, message: str) -> dict[str, object]:
    """What each line has."""
    moment = datetime.fromtimestamp(created, timezone.utc)
    time = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {"time": time, "level": level.lower(), "logger": logger, "message": message}


def line(said: dict[str, object]) -> str:
    """JSON in ASCII, so that no name of the database drives a terminal; what is no JSON as text."""
    return json.dumps(said, default=str)


def as_json(source: str = "") -> None:
    """Have the root logger's handlers write JSON."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonFormatter(source))

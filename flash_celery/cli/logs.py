"""Log records as JSON, one object on each line."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone

#: The attributes of every log record; the others were passed as `extra`.
_STANDARD = set(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime"}
#: The attributes that Celery's own loggers pass.
_CELERY = {"data"}


class JsonFormatter(logging.Formatter):
    """A formatter that writes `time` (UTC), `level`, `logger`, `message` and `source`.

    The fields that the record was given as `extra`, such as `lsn`, `table` or `slot`, follow, and
    `exception`, a traceback.
    """

    def __init__(self, source: str = "") -> None:
        super().__init__()
        self._source = source

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line."""
        values = fields(record.created, record.levelname, record.name, record.getMessage())
        if self._source:
            values["source"] = self._source
        for name, value in vars(record).items():
            if name not in _STANDARD | _CELERY | values.keys():
                values[name] = value
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return line(values)


def fields(created: float, level: str, logger: str, message: str) -> dict[str, object]:
    """Return the fields that every line has; `created` is in Unix seconds."""
    moment = datetime.fromtimestamp(created, timezone.utc)
    time = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {"time": time, "level": level.lower(), "logger": logger, "message": message}


def line(values: dict[str, object]) -> str:
    """Return JSON in ASCII, so that no name in the database controls a terminal.

    Values that JSON does not have become text.
    """
    return json.dumps(values, default=str)


def as_json(source: str = "") -> None:
    """Have the handlers of the root logger write JSON."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonFormatter(source))

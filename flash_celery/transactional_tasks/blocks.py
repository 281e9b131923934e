"""`transactional`: what is sent in the block becomes part of the database's transaction."""

from __future__ import annotations

import inspect
import logging
import time
from base64 import b64encode
from collections.abc import Callable, Generator
from contextlib import ExitStack, suppress
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from celery import Celery, current_app

from ..errors import ConfigurationError, TransactionError
from ..settings import Settings
from . import collecting, records, signing
from .connections import Link, Statements, link
from .records import TaskRecord
from .signing import Database

logger = logging.getLogger(__name__)

_Function = TypeVar("_Function", bound=Callable[..., Any])
#: One statement for all drivers: the parameter is ASCII, and its type is given.
_WRITE = (
    "SELECT pg_logical_emit_message(true, 'flash.task', decode(CAST(:m AS text), 'base64'))::text"
)
_IDENTIFY = (
    "SELECT (SELECT system_identifier::text FROM pg_control_system()), current_database()::text, "
    "EXISTS (SELECT FROM pg_replication_slots WHERE database = current_database() "
    "AND slot_name = ANY(string_to_array(CAST(:slots AS text), ',')))"
)
#: The most tasks of a message.
_MOST_TASKS = 1000
#: Seconds after which it is checked again that a slot reads the database, and between warnings.
_CHECK_SECONDS = 60.0
_NO_READER = (
    "The database %s has no slot of flash-celery, so no tasks of its transactions are enqueued "
    "that are committed before `flash replicate` has created it"
)
_EAGER = "task_always_eager is on: tasks that are sent in transactional() run at once"

#: Are called with each link, and the tasks that were written through it. Those of tests: while
#: there is one, the tasks need no slot.
observers: list[Callable[[Link, list[TaskRecord]], None]] = []
#: Slots that read a database besides those of the settings.
other_slots: set[str] = set()

_settings: WeakKeyDictionary[Celery, Settings] = WeakKeyDictionary()
_databases: WeakKeyDictionary[Any, Database] = WeakKeyDictionary()
#: When a database was last seen to have a reader, and when that was last warned of.
_checked: dict[Database, float] = {}
_warned: dict[Database, float] = {}
_eager_warned = False


def _settings_of(app: Celery) -> Settings:
    settings = _settings.get(app)
    if settings is None:
        settings = _settings[app] = Settings.from_app(app)
    return settings


class transactional:  # noqa: N801 - used as a function
    """Have the commit of a transaction enqueue the tasks that are sent in the block.

    Everything that Celery sends in the block (tasks, groups, chains, chords, `send_task`, with any
    options) is written into the transaction by `pg_logical_emit_message`. It is rolled back with
    the transaction, or with the savepoint that was open when it was sent. After the commit `flash
    replicate` publishes it, in commit order. The ids of results are final.

    A context manager (`with`, `async with`) and a decorator.

    Args:
        connection: The connection or session whose transaction carries the tasks: psycopg 3
            (`Connection`, `AsyncConnection`), psycopg2, SQLAlchemy (`Connection`, `Session`,
            `AsyncConnection`, `AsyncSession`). Default: Django's database `using`.
        using: The alias of a database of Django. Default: `default`.
        strict: Raise if there is no transaction to join; with False, each message then commits by
            itself. Default: True.

    Raises:
        ConfigurationError: There is no `flash_signing_key`, or the database is not PostgreSQL.
        TransactionError: A task cannot be carried: there is no transaction, it is larger than
            `flash_max_change_size`, or goes to a fanout exchange.
    """

    def __init__(
        self, connection: Any = None, *, using: str = "default", strict: bool = True
    ) -> None:
        if inspect.isfunction(connection) or isinstance(connection, str):
            raise ConfigurationError(
                "Write @transactional() with parentheses, and a database of Django as "
                "transactional(using='default')."
            )
        self._target = connection, using, strict
        self._block: _Block | None = None

    def __call__(self, function: _Function) -> _Function:
        """Return the function, called in a block of its own each time."""
        target = self._target

        if inspect.iscoroutinefunction(function):

            @wraps(function)
            async def run_async(*args: Any, **kwargs: Any) -> Any:
                async with transactional(target[0], using=target[1], strict=target[2]):
                    return await function(*args, **kwargs)

            return run_async  # type: ignore[return-value]

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with transactional(target[0], using=target[1], strict=target[2]):
                return function(*args, **kwargs)

        return run  # type: ignore[return-value]

    def _enter(self, asynchronous: bool) -> None:
        collecting.install()
        _warn_if_eager()
        connection = link(*self._target)
        if connection.is_async and not asynchronous:
            raise ConfigurationError(
                "This connection is asynchronous; write `async with transactional(connection):`."
            )
        if self._block is not None:
            raise ConfigurationError("Write transactional() again for each block.")
        self._block = _Block(connection)
        self._block.enter()

    def _leave(self) -> _Block:
        block, self._block = self._block, None
        assert block is not None
        block.leave()
        return block

    def __enter__(self) -> None:
        """Begin to collect."""
        self._enter(asynchronous=False)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Write what was collected; after an exception, discard it."""
        block = self._leave()
        if kind is None:
            block.link.drive(block.written())

    async def __aenter__(self) -> None:
        """Begin to collect."""
        self._enter(asynchronous=True)

    async def __aexit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Write what was collected; after an exception, discard it."""
        block = self._leave()
        if kind is None:
            await block.link.drive_async(block.written())


def _warn_if_eager() -> None:
    global _eager_warned
    if not _eager_warned and current_app.conf.task_always_eager:
        _eager_warned = True
        logger.warning(_EAGER)


class Writer:
    """Writes tasks into the transaction of a link."""

    def __init__(self, connection: Link) -> None:
        self.link = connection
        self._app: Celery | None = None

    def accept(self, app: Celery, record: TaskRecord) -> Settings:
        """Check that the transaction can carry a task.

        Raises:
            ConfigurationError: There is no key.
            TransactionError: It cannot.
        """
        if self._app not in (None, app):
            raise TransactionError(
                f"{record.task} belongs to another Celery app than the tasks before it; use a "
                "transactional() block for each app."
            )
        self._app = app
        settings = _settings_of(app)
        signing.require_keys(settings)
        if self.link.checks_at_once:
            self.link.check()
        if record.size > settings.flash_max_change_size:
            raise _too_large(record, record.size, settings)
        return settings

    def statements(self, tasks: list[TaskRecord]) -> Statements:
        """Write tasks in one statement."""
        assert self._app is not None
        self.link.check()
        settings = _settings_of(self._app)
        database = yield from self._database(settings)
        (key, *_) = signing.require_keys(settings)
        body = records.encode(tasks)
        if len(body) > records.longest(settings.flash_max_change_size):
            raise _too_large(tasks[0], len(body), settings)
        message = signing.sign(key, database, body)
        yield _WRITE, {"m": b64encode(message).decode()}
        for observer in observers:
            observer(self.link, tasks)

    def _database(
        self, settings: Settings
    ) -> Generator[tuple[str, dict[str, str]], list[Any], Database]:
        """Return the database, and check now and then that a slot reads it."""
        connection = self.link.driver_connection
        known = None
        with suppress(TypeError):  # a driver whose connections cannot be referenced weakly
            known = _databases.get(connection)
        if known is not None and time.monotonic() - _checked.get(known, 0.0) < _CHECK_SECONDS:
            return known
        sources = map(settings.of_source, settings.flash_sources)
        slots = {each.flash_replication_slot for each in (settings, *sources)} | other_slots
        ((system, name, has_reader),) = yield _IDENTIFY, {"slots": ",".join(slots)}
        database = Database(_text(system), _text(name))
        if has_reader:
            _checked[database] = time.monotonic()
        elif not observers:
            _report_no_reader(database, settings.flash_transactional_strict)
        with suppress(TypeError):
            _databases[connection] = database
        return database


def _text(value: str | bytes) -> str:
    """Return a text; psycopg 3 returns bytes where the encoding is SQL_ASCII."""
    return value if isinstance(value, str) else value.decode()


def _too_large(record: TaskRecord, size: int, settings: Settings) -> TransactionError:
    return TransactionError(
        f"The message of {record.task} has {size} bytes, and flash_max_change_size is "
        f"{settings.flash_max_change_size}; pass a reference to large values."
    )


def _report_no_reader(database: Database, strict: bool) -> None:
    if strict:
        raise TransactionError(
            f"The database {database.name} has no slot of flash-celery, so nothing would enqueue "
            "the task; start `flash replicate` once (flash_transactional_strict is on)."
        )
    now = time.monotonic()
    if now - _warned.get(database, -_CHECK_SECONDS) >= _CHECK_SECONDS:
        _warned[database] = now
        logger.warning(_NO_READER, database.name)


class _Block:
    """The collector of one block."""

    def __init__(self, connection: Link) -> None:
        self.link = connection
        self._writer = Writer(connection)
        self._gathered: list[TaskRecord] = []
        self._size = 0
        self._nesting: Any = None
        self._active = False
        #: Whether the transaction that was open when the block began has ended.
        self._ended = False
        self._hooks = ExitStack()

    def enter(self) -> None:
        """Begin to collect."""
        self._nesting = self.link.nesting
        self._hooks.enter_context(self.link.watch(self))
        for block in collecting.current.get():
            # Their tasks were sent before those of this block.
            if isinstance(block, _Block) and block.is_active() and not block.link.is_async:
                block.keep()
        self._active = True
        collecting.current.set((*collecting.current.get(), self))

    def leave(self) -> None:
        """Collect nothing more."""
        self._active = False
        if self.link.is_doomed:
            self.undo()
        self._hooks.close()
        # Blocks of generators end in any order, and perhaps in another context.
        others = (block for block in collecting.current.get() if block is not self)
        collecting.current.set(tuple(others))

    def is_active(self) -> bool:
        """Return whether the block has not ended."""
        return self._active

    def collect(self, app: Celery, record: TaskRecord) -> None:
        """Take a task; write it at once if it may not wait until the end of the block.

        Raises:
            ConfigurationError: There is no key.
            TransactionError: The transaction cannot carry it.
        """
        self._writer.accept(app, record)
        if self.link.gathers and not self._ended and self.link.nesting == self._nesting:
            self._gathered.append(record)
            self._size += record.size
            full = len(self._gathered) >= _MOST_TASKS or self._size >= records.MOST_CHARACTERS
            if full and not self.link.is_async:
                self.keep()
        elif self.link.is_async:
            raise TransactionError(
                "In an `async with transactional()` block "
                + (
                    "the transaction has ended; open a block in each transaction."
                    if self._ended
                    else "a savepoint was opened; open the block in the savepoint."
                )
            )
        else:
            self.link.drive(self._writer.statements([record]))

    def keep(self) -> None:
        """Write what was gathered."""
        self.link.drive(self.written())

    def undo(self) -> None:
        """Discard what was gathered: it was sent after the savepoint that is rolled back.

        The tasks before it were written when it was opened.
        """
        self._gathered, self._size = [], 0

    def commit(self) -> None:
        """Write what was gathered before the transaction is committed."""
        self.keep()
        self._ended = True

    async def commit_async(self) -> None:
        """Write what was gathered before the transaction is committed."""
        await self.link.drive_async(self.written())
        self._ended = True

    def roll_back(self) -> None:
        """Discard what was gathered before the transaction is rolled back."""
        self.undo()
        self._ended = True

    def written(self) -> Statements:
        """Write what was gathered."""
        while self._gathered:
            count, size = 0, 0
            for record in self._gathered[:_MOST_TASKS]:
                size += record.size
                if count and size > records.MOST_CHARACTERS:
                    break
                count += 1
            tasks, self._gathered = self._gathered[:count], self._gathered[count:]
            self._size = sum(record.size for record in self._gathered)
            yield from self._writer.statements(tasks)

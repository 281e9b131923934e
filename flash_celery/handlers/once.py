"""Run a handler in a transaction of its database (`once=`), in which a mark says what is done.

The mark moves in that transaction, so it commits or rolls back with everything that the handler
writes there. `lanes.marks` has the marks. A call without one, for a dead letter that is retried or
in a test, has the transaction alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, NoReturn, Protocol

import psycopg
from celery.exceptions import Ignore

from ..changes.change import Change, Changes
from ..errors import FlashError, PayloadError
from .celery_tasks import run_method, set_run_method
from .context import text_now
from .databases import Database, Execute, Session
from .own_writes import changes_among, layer_for
from .written_context import MAY_WRITE, statement_for, warn_of_missing_privilege

#: Whether the role of a database may write contexts.
_allowed: dict[Database, bool] = {}
#: The name in a task's request under which a call finds its mark.
MARK = "flash_mark"


class Mark(Protocol):
    """Says which changes were handled."""

    def advance(
        self,
        session: Session,
        changes: Sequence[Change],
        context_for: Callable[[Sequence[Change]], str] = ...,
    ) -> Sequence[Change] | None:
        """Move past changes, and return those that were not handled; None: `create` it first."""

    def create(self, execute: Execute) -> None:
        """Create the mark, in a transaction of its own."""

    def wait(self, reason: str) -> NoReturn:
        """Raise `Ignore`; the changes are handled later."""


def run_in_transaction(task: Any, database: Database) -> None:
    """Make a task run its function in a transaction of a database."""
    run = run_method(task)

    @wraps(run)
    def run_once(*args: Any, **kwargs: Any) -> Any:
        call = _Call(task, database, run, args, kwargs)
        try:
            while not call.attempt():
                assert call.mark is not None
                _create(database, call.mark)
        except (Ignore, PayloadError):
            raise
        except Exception as error:
            if call.mark is None or not call.failed_outside(error):
                raise
            # A dead letter would leave the order, as would all changes behind it. If a connection
            # is lost during COMMIT, the mark will say whether that succeeded.
            call.mark.wait(_described(error))
        return call.result

    set_run_method(task, run_once)


def call_directly(database: Database, run: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call a function in a transaction, unless it is called for a task, which has one."""
    if any(change.connection is not None for change in changes_among(args, kwargs)):
        return run(*args, **kwargs)
    call = _Call(None, database, run, args, kwargs)
    call.attempt()
    return call.result


class _Call:
    """One call of a handler.

    Args:
        task: Its task; None if the function is called without one.
        database: The database.
        run: The function of the task.
        args: The arguments of the function.
        kwargs: Its keyword arguments.
    """

    def __init__(
        self,
        task: Any,
        database: Database,
        run: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> None:
        self._request = getattr(task, "request", None)
        self._handler = str(task.name) if task is not None else ""
        self._database = database
        self._run = run
        self._args = args
        self._kwargs = kwargs
        self._delivered = changes_among(args, kwargs)
        #: The mark of the lane, if the changes are compared with it.
        self.mark: Mark | None = None
        if self._delivered:
            self.mark = getattr(self._request, MARK, None)
        #: Whether the function was called, and whether it has returned.
        self._began = self._returned = False
        #: Its result.
        self.result: Any = None

    def attempt(self) -> bool:
        """Call the function, unless everything was handled; return False if there is no mark yet.

        Raises:
            Ignore: Everything was handled.
        """
        with self._database.transaction() as session:
            changes: Sequence[Change] | None = self._delivered
            context_for = partial(self._context_for, session)
            if self.mark is not None:
                changes = self.mark.advance(session, self._delivered, context_for)
            elif context := context_for(self._delivered):
                session.execute(statement_for(context), ())
            if changes is None:
                return False
            if self._delivered and not changes:
                raise Ignore("handled already")
            for change in changes:
                change._call = change._call._replace(connection=session.connection)
            self._began = True
            call = _without_handled(self._run, self._delivered, changes)
            self.result = call(*self._args, **self._kwargs)
            _raise_retry(self._request)
            self._returned = True
            return True
        raise FlashError(
            "The transaction of once= was rolled back without an error; let its context manager, "
            "and psycopg.Rollback, not hide that."
        )

    def _context_for(self, session: Session, changes: Sequence[Change]) -> str:
        """Return what has the function's writes say that it was this handler; "" for nothing.

        Django writes that by itself.
        """
        if not self._handler or not changes or hasattr(session.connection, "execute_wrappers"):
            return ""
        if self._database not in _allowed:
            ((_allowed[self._database],),) = session.execute(MAY_WRITE, [])
        if not _allowed[self._database]:
            warn_of_missing_privilege(f"the database of once= of {self._handler}")
            return ""
        with layer_for(self._handler, changes):
            return text_now()

    def failed_outside(self, error: Exception) -> bool:
        """Return whether an error is that of the database, before the function or after it."""
        return not self._began or (self._returned and _is_operational(error))


def _is_operational(error: BaseException) -> bool:
    """Return whether an error of any driver is about the connection or the server."""
    return any(kind.__name__ == "OperationalError" for kind in type(error).__mro__)


def _described(error: Exception) -> str:
    """Return the name of an error, with its text if that is ours or libpq's, without a password."""
    cause = getattr(error, "orig", None) or error.__cause__ or error
    drivers = isinstance(cause, psycopg.OperationalError) or hasattr(cause, "pgcode")
    shown = isinstance(error, FlashError) or (drivers and _is_operational(cause))
    text = f": {error if isinstance(error, FlashError) else cause}" if shown else ""
    return f"its database of once= fails ({type(error).__name__}{text})"


def pass_over(database: Database, mark: Mark, changes: Sequence[Change]) -> None:
    """Move a mark past changes that the handler does not get."""
    while True:
        with database.transaction() as session:
            if mark.advance(session, changes) is not None:
                return
        _create(database, mark)


def _create(database: Database, mark: Mark) -> None:
    with database.transaction() as session:
        mark.create(session.execute)


def _without_handled(
    run: Callable[..., Any], delivered: Sequence[Change], changes: Sequence[Change]
) -> Callable[..., Any]:
    """Return what calls a function with those changes of a batch that were not handled."""
    if len(changes) == len(delivered):
        return run

    def left(argument: Any) -> Any:
        return Changes(changes) if isinstance(argument, Changes) else argument

    def call(*args: Any, **kwargs: Any) -> Any:
        return run(*map(left, args), **{name: left(each) for name, each in kwargs.items()})

    return call


def _raise_retry(request: Any) -> None:
    """Raise the retry that a handler has asked for with `throw=False`, to roll back."""
    retries = getattr(request, "flash_retries", None)
    if retries:
        raise retries[-1]

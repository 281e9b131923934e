"""Every error that flash-celery raises, and what to do about each.

    FlashError
    ├── ConfigurationError        a setting of the app or of the server
    ├── SubscriptionError         an `on_change` that cannot work
    ├── CatalogError              tables, privileges and other objects in PostgreSQL
    │   ├── SlotMissing
    │   ├── SlotLost
    │   ├── SlotInUse             (retry)
    │   ├── PublicationMismatch
    │   ├── ReplicaIdentityMissing
    │   ├── StepFailed            a statement of the set-up
    │   └── TableLocked           (retry)
    ├── ProtocolError             bytes that PostgreSQL should not have sent
    ├── ReplicationError          the connection to PostgreSQL (retry)
    │   ├── DecodingFailed        an internal error of PostgreSQL
    │   ├── SavepointUnclear      messages of a streamed transaction
    │   ├── RowNotSent            a row that PostgreSQL cannot send
    │   └── CredentialsError      no DSN or password from a callable or a command
    │       └── WrongCredentials
    ├── SpoolError                the disk, for a large open transaction (retry)
    ├── PublishError              the broker (retry)
    │   ├── Unroutable
    │   ├── NotConfirmed
    │   └── LanesNotReady
    ├── TakenOver                 another worker publishes now (retry)
    ├── ConfirmedLost             the broker has lost messages that it had confirmed (retry)
    ├── ChangeTooLarge            a change that the broker cannot take
    ├── HandlerLoop               handlers that write each other's tables
    ├── PayloadError              a message that cannot be read
    ├── RowError                  a row that does not fit the class of `into=`
    ├── ProcessKilled             a handler whose process dies
    ├── TransactionError          a task that a transaction cannot carry
    ├── TaskRefused               a message that carries tasks, and is not signed by the application
    ├── NoInstance                a change that is not a row of a Django model
    ├── NoSuchLetter              a dead letter that does not exist
    └── NotDone                   handlers that `flash wait` waited for

`retry` states whether waiting can help, `solution` what to do. The errors can be pickled, because
Celery stores the exceptions of tasks.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, ClassVar

from .escaping import escaped


class FlashError(Exception):
    """Base of all errors of flash-celery."""

    retry: ClassVar[bool] = False
    solution: ClassVar[str] = ""

    def __str__(self) -> str:
        """Return the message on one line, whatever names and values it holds."""
        return escaped(super().__str__())


class ConfigurationError(FlashError):
    """A setting is missing, misspelt or out of range."""

    solution = "Correct the setting that the message names; `flash doctor` checks them all."


class SubscriptionError(FlashError):
    """An `on_change` names something that does not exist, or contradicts another `on_change`."""

    solution = "Correct the `on_change` of the handler that the message names."


class CatalogError(FlashError):
    """An object or a privilege in PostgreSQL is not what replication needs."""

    solution = "`flash doctor` prints the SQL that fixes it."


class StepFailed(CatalogError):
    """PostgreSQL refuses a statement of the set-up, which is in `step`."""

    def __init__(self, message: str, step: Any = None) -> None:
        super().__init__(message)
        self.step = step


class SlotMissing(CatalogError):
    """The replication slot was dropped; changes since then cannot be read."""

    solution = (
        "Run `flash reset` to start again at the present, then rebuild what depends on the missing "
        "changes."
    )


class SlotLost(CatalogError):
    """PostgreSQL invalidated the slot, because it removed WAL that the slot still needed."""

    solution = (
        "Run `flash reset`, rebuild what depends on the missing changes, and raise "
        "`max_slot_wal_keep_size`."
    )


class SlotInUse(CatalogError):
    """Another replication worker reads the slot; this one waits to take over."""

    retry = True
    solution = (
        "Nothing to do if a hot spare is wanted. `flash status` shows which worker reads the slot."
    )


class PublicationMismatch(CatalogError):
    """A publication was altered after `flash replicate` had set it up."""

    solution = (
        "Undo the alteration (`flash doctor` prints the SQL), or start again at the present: "
        "`flash reset`."
    )


class ReplicaIdentityMissing(CatalogError):
    """A subscription needs old values that the table's replica identity does not include."""

    solution = "Run the ALTER TABLE that the message names, or set flash_replica_identity = 'auto'."


class TableLocked(CatalogError):
    """A statement of the set-up waited too long for a lock that another session holds."""

    retry = True
    solution = "It is retried. End the session that the message names if it is idle."


class ProtocolError(FlashError):
    """PostgreSQL sent bytes that its documentation does not describe."""

    solution = "Please report it with the server's version; nothing has been acknowledged."


class ReplicationError(FlashError):
    """The connection to PostgreSQL failed or was closed."""

    retry = True
    solution = "The worker reconnects. Check that PostgreSQL runs and accepts connections."


class DecodingFailed(ReplicationError):
    """PostgreSQL failed to decode its own WAL."""

    solution = (
        "If it happens again, see PostgreSQL's log, and docs/operating.md, A row that PostgreSQL "
        "cannot send; the slot keeps all changes."
    )


class SavepointUnclear(ReplicationError):
    """A streamed transaction has a message that an aborted savepoint may have written.

    PostgreSQL streams a message without saying which savepoint it is of, and only what has
    committed after the commit. The session ends, and the next one reads the transaction whole.
    """

    solution = "Nothing to do; its changes are delivered once it has been read again."
    #: Where the transaction committed.
    commit_lsn = 0


class RowNotSent(ReplicationError):
    """PostgreSQL cannot send a row, because it cannot make text of it that is UTF-8."""

    solution = (
        "Remove the cause, or move the slot past the row's transaction, which is not delivered "
        "then: docs/operating.md, A row that PostgreSQL cannot send."
    )


class CredentialsError(ReplicationError):
    """A callable or a command has given no DSN or password to connect with."""

    solution = "It is asked again. Call it by hand, as the user and on the machine of the worker."


class WrongCredentials(CredentialsError):
    """A callable or a command has given something that is no DSN or password, or is not there.

    `flash replicate` ends with it, unless it has connected before.
    """

    solution = "Correct the setting that the message names, or what it leads to."


class SpoolError(FlashError):
    """A large open transaction cannot be stored on disk."""

    retry = True
    solution = (
        "PostgreSQL keeps the transaction. Make room or set flash_spool_directory and restart, or "
        "turn flash_use_streaming off."
    )


class PublishError(FlashError):
    """The broker did not take all messages, only the first `confirmed` ones."""

    retry = True
    confirmed = 0
    #: The size in bytes of the largest message that the broker takes, if one was larger; else 0.
    size_limit = 0
    #: Whether the broker refuses the first message that it did not take, whenever it is sent.
    refused = False
    #: The most seconds until the others are sent again.
    longest_pause = 15.0
    solution = "The messages are sent again. Check that the broker runs and has room."


class Unroutable(PublishError):
    """The broker returned a message because it has no queue for it."""

    solution = "The queue was deleted, or its binding was; the worker declares it again."


class NotConfirmed(PublishError):
    """The broker refused a message, or did not confirm it in time."""


class LanesNotReady(PublishError):
    """The lanes of an ordered handler cannot be filled yet."""

    solution = "Nothing is lost; see `flash lanes list`."


class TakenOver(FlashError):
    """Another replication worker has begun to publish the changes of this slot."""

    retry = True
    solution = "This worker waits until the slot is free."


class ConfirmedLost(FlashError):
    """The broker has lost messages that it had confirmed."""

    retry = True
    solution = (
        "Changes that were not acknowledged yet are enqueued again. For the others, run `flash "
        "replay --since` with the position if flash_replay_window covers it, or rebuild what "
        "depends on them."
    )


class ChangeTooLarge(FlashError):
    """A change is larger than `flash_max_change_size` or than the broker allows.

    It becomes a dead letter.
    """

    solution = (
        "Leave the large column out (`fields=`), or raise the setting and the broker's own limit."
    )


class HandlerLoop(FlashError):
    """A change was written for a change that was written for a change …, too many times.

    It becomes a dead letter. Handlers write each other's tables, or one writes its own.
    """

    solution = (
        "End the loop: ignore_own=True leaves out a handler's own writes, a condition (`where`) "
        "those that need nothing. If it is none, raise flash_max_depth. Then `flash dead retry`."
    )


class PayloadError(FlashError):
    """A task message is damaged, or of another version of flash-celery."""

    solution = "Upgrade the Celery workers before the replication worker."


class RowError(FlashError):
    """A row does not fit the class that the handler declares with `into=`, so its task fails."""

    solution = "Correct the class of `into=`, deploy the workers, then run `flash dead retry`."


class ProcessKilled(FlashError):
    """The processes of a handler died on the same change `flash_max_deaths` times."""

    solution = (
        "Fix the handler, then run `flash dead retry`; the kernel's log shows what it ran out of."
    )


class TransactionError(FlashError):
    """A transaction cannot carry a task that was sent in `transactional()`."""

    solution = "Roll the transaction back, and correct what the message names."


class TaskRefused(FlashError):
    """A message that carries tasks was not signed by the application for this database."""

    solution = (
        "Its tasks were not enqueued. If the application wrote it, give `flash replicate` the same "
        "flash_signing_key; otherwise find out who may run SQL in the database."
    )


class NoInstance(FlashError):
    """A change, or a value in it, cannot be turned into an instance of a Django model."""

    solution = "Use `change.new` and `change.old` instead."


class NoSuchLetter(FlashError):
    """A dead letter is not, or no longer, in the queue."""

    solution = "`flash dead list` shows the dead letters that exist."


class NotDone(FlashError):
    """Handlers have not processed the changes that were waited for."""

    solution = "`flash status` shows the slot and the queues, `flash dead list` the failed changes."


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """Return `; did you mean …?`, with the known name most similar to a wrong one, or ""."""
    by_lower_case = {str(each).casefold(): str(each) for each in known}
    similar = difflib.get_close_matches(str(name).casefold(), by_lower_case, n=1)
    return f"; did you mean {by_lower_case[similar[0]]}?" if similar else ""

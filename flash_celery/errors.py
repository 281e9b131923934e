"""Every error flash-celery raises, and what to do about each.

    FlashError
    ├── ConfigurationError        a setting, or the server's settings
    ├── SubscriptionError         an `on_change` that cannot work
    ├── CatalogError              tables, privileges and other objects in PostgreSQL
    │   ├── SlotMissing
    │   ├── SlotLost
    │   ├── SlotInUse             (retry)
    │   ├── PublicationMismatch
    │   ├── ReplicaIdentityMissing
    │   └── TableLocked           (retry)
    ├── ProtocolError             bytes that PostgreSQL should not have sent
    ├── ReplicationError          the connection to PostgreSQL (retry)
    │   └── DecodingFailed        an error of the server's own
    ├── SpoolError                the disk, for a large open transaction (retry)
    ├── PublishError              the broker (retry)
    │   ├── Unroutable
    │   └── NotConfirmed
    ├── TakenOver                 another session publishes now (retry)
    ├── ConfirmedLost             the broker has lost what it had confirmed (retry)
    ├── ChangeTooLarge            a change that no broker would take
    ├── PayloadError              a message that cannot be read
    ├── RowError                  a row that is not what a handler's `into=` says
    ├── ProcessKilled             a handler that ends its process
    ├── NoInstance                a change that is no row of a Django model
    ├── NoSuchLetter              a dead letter that is not there
    └── NotDone                   what was waited for

`retry` says whether waiting can help; `solution` is a sentence for whoever is on call.
They pickle, because Celery stores the exceptions of tasks.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

from .escaping import escaped


class FlashError(Exception):
    """Base of all errors of flash-celery."""

    retry: ClassVar[bool] = False
    solution: ClassVar[str] = ""

    def __str__(self) -> str:
        """One line, whatever names and values are in it."""
        return escaped(super().__str__())


class ConfigurationError(FlashError):
    """A setting is missing, misspelt or out of range."""

    solution = "Correct the setting that the message names; `flash doctor` checks them all."


class SubscriptionError(FlashError):
    """An `on_change` names something that does not exist or contradicts another."""

    solution = "Correct the `on_change` of the handler that the message names."


class CatalogError(FlashError):
    """An object or a privilege in PostgreSQL is not what replication needs."""

    solution = "`flash doctor` prints the SQL that mends it."


class SlotMissing(CatalogError):
    """The replication slot existed and has been dropped; what was written since cannot be read."""

    solution = (
        "Run `flash reset` to start anew at the present, then rebuild what depends on the gap."
    )


class SlotLost(CatalogError):
    """The slot was invalidated: the server removed WAL that it still needed."""

    solution = "Run `flash reset`, rebuild what depends on the gap, raise `max_slot_wal_keep_size`."


class SlotInUse(CatalogError):
    """Another replication worker reads the slot; this one waits and takes over."""

    retry = True
    solution = "Nothing to do: this is how a standby waits. `flash status` says who holds it."


class PublicationMismatch(CatalogError):
    """A publication is not as `replicate` left it: somebody altered it."""

    solution = "Undo the alteration (`flash doctor` prints the SQL), or start anew: `flash reset`."


class ReplicaIdentityMissing(CatalogError):
    """A subscription needs old values that the table's replica identity does not give."""

    solution = "Run the ALTER TABLE the message names, or set flash_replica_identity = 'auto'."


class TableLocked(CatalogError):
    """DDL could not get its lock within the lock timeout because of another session."""

    retry = True
    solution = "It is tried again; end the session the message names if it is idle."


class ProtocolError(FlashError):
    """PostgreSQL sent bytes that its documentation does not describe."""

    solution = "Please report it with the server's version; nothing has been acknowledged."


class ReplicationError(FlashError):
    """The connection to PostgreSQL failed or was closed."""

    retry = True
    solution = "It is made again by itself; check that PostgreSQL runs and accepts connections."


class DecodingFailed(ReplicationError):
    """PostgreSQL's own decoding failed."""

    solution = "If it comes again, look into PostgreSQL's log; the slot keeps everything."


class SpoolError(FlashError):
    """A large transaction that is still open cannot be kept on disk."""

    retry = True
    solution = (
        "PostgreSQL keeps it meanwhile. Make room or set flash_spool_directory, and start anew; "
        "or turn flash_use_streaming off."
    )


class PublishError(FlashError):
    """The broker did not take the messages, but for the first `confirmed` ones."""

    retry = True
    confirmed = 0
    #: Bytes of the largest message that it takes, where one that has more is what was wrong.
    most = 0
    solution = "They are sent again by themselves; check that the broker runs and has room."


class Unroutable(PublishError):
    """The broker returned a message because no queue takes it."""

    solution = "The queue was deleted or is bound otherwise; it is declared again by itself."


class NotConfirmed(PublishError):
    """The broker refused a message, or did not confirm it in time."""


class TakenOver(FlashError):
    """Another replication worker has begun to publish what this slot has."""

    retry = True
    solution = "This one waits until the slot is free."


class ConfirmedLost(FlashError):
    """The broker does not have any more what it had confirmed."""

    retry = True
    solution = (
        "What was not acknowledged yet is enqueued again by itself; for the rest run `flash replay "
        "--since` with the position, where flash_replay_window keeps it, or rebuild what depends "
        "on it."
    )


class ChangeTooLarge(FlashError):
    """A change has more bytes than `flash_max_change_size` or the broker allows; it becomes a dead
    letter."""

    solution = (
        "Leave the large column out (`fields=`), or raise the setting and the broker's own limit."
    )


class PayloadError(FlashError):
    """A task message is of another version of flash-celery, or damaged."""

    solution = "Upgrade the Celery workers before the replication worker."


class RowError(FlashError):
    """A row does not fit the class that the handler wants it in; its task fails."""

    solution = "Correct the class of `into=`, deploy the workers, then `flash dead retry`."


class ProcessKilled(FlashError):
    """A handler's process died on the same change as often as `flash_max_deaths` allows."""

    solution = (
        "Mend the handler, then `flash dead retry`; the kernel's log says what it ran out of."
    )


class NoInstance(FlashError):
    """A change, or a value of it, that cannot be told as an instance of a Django model."""

    solution = "Use `change.new` and `change.old`, which hold what the change holds."


class NoSuchLetter(FlashError):
    """A dead letter is not, or no longer, in the queue."""

    solution = "`flash dead list` shows those that are."


class NotDone(FlashError):
    """Handlers have not done what was waited for."""

    solution = "`flash status` shows the slot and the queues, `flash dead list` what has failed."


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """Return `did you mean …?` with the known name most similar to a wrong one, or ""."""
    by_lower_case = {str(each).casefold(): str(each) for each in known}
    similar = difflib.get_close_matches(str(name).casefold(), by_lower_case, n=1)
    return f"did you mean {by_lower_case[similar[0]]}?" if similar else ""

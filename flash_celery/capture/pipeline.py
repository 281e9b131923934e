"""The path of a change through the capture side: from the bytes of a stream to a sink.

`flash replicate`, `flash replay`, `flash tail` and `flash_celery.testing` differ only in the source
of their stream and in the `Sink` that takes the deliveries.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from ..changes.history import History
from ..errors import SavepointUnclear
from ..handlers.subscriptions import Subscription
from ..protocol import frames
from ..protocol.lsn import Lsn
from ..telemetry import Telemetry
from .relations import RelationCatalog
from .router import Router, Sink, TaskReceiver
from .transactions import LONGEST_RUN, Transactions, runs

_KEEPALIVE = frames.KEEPALIVE


class Pipeline:
    """Assembles the transactions of one stream and routes their rows to a sink.

    Args:
        subscriptions: All subscriptions to the stream's database.
        catalog: Describes the relations of the stream.
        sink: Takes the deliveries.
        spool_directory: Where large open transactions are kept. Default: `/var/tmp`.
        telemetry: Counts rows and messages.
        history: The server's history, which the messages carry. Default: unknown.
        tasks: Takes the logical messages that carry tasks. Default: they are left out.
    """

    def __init__(
        self,
        subscriptions: Sequence[Subscription],
        catalog: RelationCatalog,
        sink: Sink,
        spool_directory: str = "",
        telemetry: Telemetry | None = None,
        history: History | None = None,
        tasks: TaskReceiver | None = None,
    ) -> None:
        self.telemetry = telemetry or Telemetry()
        router = Router(subscriptions, catalog, sink, self.telemetry, tasks)
        self.transactions = Transactions(router, spool_directory, history)
        #: The rest of each burst that arrived; it waits while a spooled transaction is replayed.
        self._arrived: deque[Iterator[tuple[bytes, Sequence[bytes]]]] = deque()
        #: Whether the server has asked for a status update; the owner of the stream resets it.
        self.reply_requested = False
        #: Why no more may be delivered.
        self._unclear: SavepointUnclear | None = None

    def feed(self, messages: Sequence[bytes]) -> None:
        """Queue what `ReplicationConnection.receive` returned."""
        self._arrived.append(runs(messages))

    @property
    def pending(self) -> bool:
        """Whether something has arrived that `deliver` has not delivered."""
        unclear = self._unclear is not None
        return bool(self._arrived) or self.transactions.replaying or unclear

    def deliver(self) -> Iterator[Lsn | None]:
        """Deliver what has arrived, about `LONGEST_RUN` messages each time it is advanced.

        Yields the position up to which everything has been delivered, or None if it has not moved.
        The caller may stop each time; the next call goes on from there.

        Raises:
            ProtocolError: A message is not one of pgoutput.
            SavepointUnclear: The next transaction has to be read again without streaming.
        """
        if self._unclear is not None:
            raise self._unclear
        arrived, transactions = self._arrived, self.transactions
        position, silent = None, 0
        while arrived or transactions.replaying:
            if transactions.replaying:
                yield transactions.replay() or position
                position = None
                continue
            for head, run in arrived[0]:
                if head[0] == _KEEPALIVE:
                    reached = self._keepalive(run)
                else:
                    try:
                        reached = transactions.receive(head, run)
                    except SavepointUnclear as unclear:
                        self._unclear = unclear
                        if position is not None:
                            yield position
                        raise
                if reached is not None:
                    position = reached
                silent += len(run)
                if silent >= LONGEST_RUN:
                    yield position
                    position, silent = None, 0
                if transactions.replaying:
                    break
            else:
                arrived.popleft()
        if silent:
            yield position

    def close(self) -> None:
        """Close the spools of open transactions; the server will send them again."""
        self.transactions.close()

    def _keepalive(self, run: Sequence[bytes]) -> Lsn | None:
        keepalives = [frames.keepalive(frame) for frame in run]
        self.reply_requested |= any(keepalive.reply for keepalive in keepalives)
        # Between transactions, everything committed before the server's position has been sent.
        return None if self.transactions.open else keepalives[-1].wal_end

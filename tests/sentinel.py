"""Two Valkeys, one the replica of the other, and a Sentinel that promotes it."""

import contextlib
import signal

import redis

from example_project.servers import Valkey, wait_until

#: Their name in the Sentinel; for `broker_transport_options`.
MASTER = "shop"
OPTIONS = {"master_name": MASTER}
#: Milliseconds in which no write is done, unless it is over before.
_PAUSE = 30_000
#: Milliseconds without an answer after which Sentinel promotes the replica, and where it must not:
#: on a busy machine it would take the new primary for dead at once, and promote the former one,
#: which has none of what was confirmed in between.
_SOON, _NEVER = 1000, 600_000


class Sentinel(Valkey):
    """Watches a Valkey and its replicas, and promotes a replica."""

    def __init__(self, primary):
        super().__init__()
        self.primary = primary

    @property
    def command(self):
        configuration = self.folder / "sentinel.conf"
        configuration.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {self.folder}\n"
            f"sentinel monitor {MASTER} 127.0.0.1 {self.primary.port} 1\n"
            f"sentinel down-after-milliseconds {MASTER} {_NEVER}\n"
            f"sentinel failover-timeout {MASTER} 5000\n"
        )
        return [*super().command[:1], str(configuration), "--sentinel"]

    @property
    def url(self):
        return f"sentinel://127.0.0.1:{self.port}/0"

    @property
    def master(self):
        """The port of the one that is the primary."""
        with redis.Redis(port=self.port) as client:
            return int(client.sentinel_get_master_addr_by_name(MASTER)[1])

    @property
    def knows_replica(self):
        with redis.Redis(port=self.port) as client:
            return bool(client.sentinel_slaves(MASTER))


def follows(replica):
    """Whether it is fed by its primary."""
    with redis.Redis(port=replica.port) as client:
        return client.info("replication").get("master_link_status") == "up"


class Replicated:
    """`with Replicated() as broker:`; `port` is that of whichever is the primary now."""

    def __init__(self, **options):
        options = {"repl-diskless-sync-delay": 0, **options}
        server = Valkey(**options)
        self._pair = server, Valkey(**options, replicaof=f"127.0.0.1 {server.port}")
        self.sentinel = Sentinel(server)
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            for server in self._pair:
                stack.enter_context(server)
            wait_until(lambda: follows(self._pair[1]), "the replica to be fed")
            stack.enter_context(self.sentinel)
            wait_until(lambda: self.sentinel.knows_replica, "Sentinel to know the replica")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exit_):
        self._stack.close()

    @property
    def servers(self):
        return *self._pair, self.sentinel

    @property
    def url(self):
        return self.sentinel.url

    @property
    def port(self):
        return self.sentinel.master

    @property
    def primary(self):
        port = self.port
        return next(server for server in self._pair if server.port == port)

    @property
    def replica(self):
        port = self.port
        return next(server for server in self._pair if server.port != port)

    def hand_over(self):
        """Start a coordinated failover: the primary takes no writes until the replica has them all.

        Return a function that waits for its end.
        """
        primary = self.primary
        with redis.Redis(port=self.sentinel.port) as client:
            client.execute_command("SENTINEL", "FAILOVER", MASTER, "COORDINATED")
        return lambda: self._followed_by(primary)

    def kill(self):
        """Kill the primary once the replica has all that it confirmed; Sentinel promotes it.

        Return a function that starts the former primary as a replica.
        """
        primary, replica = self.primary, self.replica
        with (
            redis.Redis(port=primary.port) as client,
            redis.Redis(port=replica.port) as other,
        ):
            # Replication is asynchronous: what is confirmed and not sent yet would be lost.
            client.client_pause(_PAUSE, all=False)
            goal = client.info("replication")["master_repl_offset"]
            wait_until(
                lambda: other.info("replication")["slave_repl_offset"] >= goal,
                "the replica to have everything",
            )
        primary.stop(signal.SIGKILL)
        self._patience(_SOON)

        def mend():
            wait_until(lambda: self.port == replica.port, "the promotion")
            self._patience(_NEVER)
            primary.options["replicaof"] = f"127.0.0.1 {replica.port}"
            replica.options.pop("replicaof", None)
            primary.start()
            self._followed_by(primary)

        return mend

    def _patience(self, milliseconds):
        with redis.Redis(port=self.sentinel.port) as client:
            client.sentinel_set(MASTER, "down-after-milliseconds", milliseconds)

    def _followed_by(self, former):
        """Wait until the one that was the primary is the replica, and Sentinel knows it."""
        wait_until(lambda: self.port != former.port and follows(former), "the former primary")
        wait_until(self._settled, "the failover to be over")

    def _settled(self):
        with redis.Redis(port=self.sentinel.port) as client:
            primary, (replica,) = client.sentinel_master(MASTER), client.sentinel_slaves(MASTER)
        return (primary["flags"], replica["flags"]) == ("master", "slave") and replica[
            "master-link-status"
        ] == "ok"

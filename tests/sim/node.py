"""One worker process of the simulation: its engine's turns, its copies, its fetches, its pulse."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sim_engine import Crashed, Frame, SimWorker, fetch

from baton.core.fetches import OVERDUE_AFTER_S
from baton.core.limits import SchedulerConfig
from baton.core.plan import ExportOrder, ImportOrder, Update
from baton.core.sequence import SequenceId
from baton.types import Pulse, Role

if TYPE_CHECKING:
    from sim.cluster import Cluster

BEAT_S = 0.1


class Node:
    """What is lost with the process is made anew by `start`."""

    def __init__(self, cluster: Cluster, name: str, role: Role, config: SchedulerConfig) -> None:
        self.cluster = cluster
        self.name = name
        self.role = role
        self.config = config
        self.epoch = 0
        self.known_epoch = 0  # of the start that the gateway's stream goes to
        self.last_words: dict[int, tuple[SequenceId, ...] | None] = {}  # suspects, by epoch
        self.start()

    def start(self) -> None:
        """A new process: a new epoch, nothing in its memory."""
        self.epoch += 1
        depth = 1 + (self.cluster.seed + self.epoch) % 2
        self.worker = SimWorker(self.config, self.name, self.epoch, check=False, depth=depth)
        self.worker.runner.poison = self.cluster.poison
        self.inbox: list[Callable[[], None]] = []
        self.frozen_until = 0.0
        self.hung_until = 0.0
        self.long_until = 0.0
        self.parted_until = 0.0
        self.busy = False
        self.num_moves = 0
        self.told_moves = -1
        self.later(BEAT_S, self._beat)

    def put(self, message: Callable[[], None]) -> None:
        """Something for the engine: it is looked at between two steps."""
        self.inbox.append(message)
        self.turn()

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        """`action` on this process, if it still lives by then; a frozen one does it afterwards."""
        epoch = self.epoch

        def act() -> None:
            if epoch != self.epoch:
                return
            if self.frozen_until > self.cluster.now:
                self.cluster.at(self.frozen_until, act)
            else:
                action()

        self.cluster.at(self.cluster.now + seconds, act)

    def turn(self) -> None:
        if not self.busy:
            self.busy = True
            self.later(0.0, self._turn)

    def _beat(self) -> None:
        """Whatever the engine does; while a step is long, layers are counted."""
        layers = 0 if self.hung_until > self.cluster.now else self.cluster.now < self.long_until
        self.num_moves += layers
        batch: tuple[SequenceId, ...] = ()
        if self.busy and self.num_moves == self.told_moves:
            books = self.worker.scheduler.books
            only = books.suspects.running()
            batch = tuple(books.running) if only is None else (only.id,)
        self.told_moves = self.num_moves
        self.cluster.hear(self, Pulse(self.num_moves, self.busy, 0.01, batch))
        if not self.cluster.is_over:
            self.later(BEAT_S, self._beat)

    def _turn(self) -> None:
        if self.hung_until > self.cluster.now:
            self.later(self.hung_until - self.cluster.now, self._turn)
            return
        inbox, self.inbox = self.inbox, []
        self.num_moves += 1
        for message in inbox:
            message()
            self._pass_on(self.worker.settle())
        before = self.worker.runner.num_computed
        try:
            self._pass_on(self.worker.step(self.cluster.now))
        except Crashed as crash:
            self.cluster.crashed(self, crash.batch)
            return
        stepped = self.worker.runner.num_computed > before or self.worker.runner.pending > 0
        self.busy = False
        if stepped or self.inbox:
            self.busy = True
            step_s = self.cluster.step_s()
            self.long_until = self.cluster.now + step_s
            self.later(step_s, self._turn)
        else:
            deadline = self.worker.scheduler.next_deadline()
            if deadline is not None:
                self.later(max(0.0, deadline - self.cluster.now) + 1e-6, self.turn)

    def _pass_on(self, update: Update) -> None:
        orders, self.worker.exports = self.worker.exports, []
        for export in orders:
            self.later(self.cluster.seconds(0.003), lambda export=export: self._copied(export))
        fetches, self.worker.imports = self.worker.imports, []
        for order in fetches:
            self._fetch(order)
        told = update.deltas or update.sealed or update.landed or update.handoffs
        if told or update.alone:
            self.cluster.to_gateway(self, update)

    def _copied(self, order: ExportOrder) -> None:
        ok = not self.cluster.strikes("copy_fails")
        digest = self.worker.store.copy(order, self.worker.kv) if ok else None
        if not ok:
            self.worker.store.frames[order.frame] = Frame()
        self.put(lambda: self.worker.scheduler.exported(order.key, digest, self.cluster.now))

    def _fetch(self, order: ImportOrder) -> None:
        """The blocks are read at one moment and have arrived at another."""
        cluster = self.cluster
        source = self if order.grant is None else cluster.nodes[order.grant.source]
        seconds = cluster.seconds(0.002)
        if source is not self:
            seconds += cluster.link_s(source, self, len(order.wanted))
        seconds = min(seconds, max(0.0, order.deadline - cluster.now))
        read_at = seconds * cluster.rng.random()
        if source is not self and cluster.strikes("stall"):
            self._stall(order)
            return

        def arrive(results: tuple[str, ...]) -> None:
            for want, result in zip(order.wanted, results, strict=True):
                if result not in ("ok", "corrupt"):
                    self.worker.kv.poison(want.block)
            self.put(
                lambda: self.worker.scheduler.imported(order.number, results, cluster.now, seconds)
            )

        def read() -> None:
            late = cluster.now + seconds - read_at >= order.deadline
            results = ("timed_out",) * len(order.wanted)
            if not late:
                results = fetch(order, source.worker.store, self.worker.kv)
                if source is not self and cluster.strikes("cut"):
                    results = ("unreachable",) * len(results)
                elif source is not self and cluster.strikes("truncate"):
                    cut = cluster.rng.randrange(len(results))
                    results = results[:cut] + ("unreachable",) * (len(results) - cut)
            self.later(seconds - read_at, lambda: arrive(results))

        self.later(read_at, read)

    def _stall(self, order: ImportOrder) -> None:
        """It writes to its blocks whenever it likes, and is acknowledged long after."""
        cluster = self.cluster
        late_s = max(0.0, order.deadline - cluster.now) + OVERDUE_AFTER_S
        late_s += cluster.rng.uniform(0.0, 8.0)

        def write() -> None:
            for want in order.wanted:
                self.worker.kv.poison(want.block)

        def acknowledge() -> None:
            write()
            results = ("timed_out",) * len(order.wanted)
            self.put(lambda: self.worker.scheduler.imported(order.number, results, cluster.now))

        for _ in range(3):
            self.later(cluster.rng.uniform(0.0, late_s), write)
        self.later(late_s + cluster.rng.uniform(0.001, 5.0), acknowledge)

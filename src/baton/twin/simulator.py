"""A whole deployment on a virtual clock: the code that serves, with a cost model for a GPU.

    trace ─▶ Gateway (RequestTable, Router) ══messages══▶ Node (Scheduler, pool, store, leases)
                 ▲                                          │  └─▶ CostRunner: a step's seconds
                 └────────────── reports ◀══════════════════┘  └─▶ Fetcher ─▶ Network: bytes

Every decision is made by the objects that a server runs; nothing here decides. Chance is in the
workload alone, which has a seed: the same inputs give the same result, to the last bit.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from baton.core.router import Router
from baton.errors import ConfigError
from baton.twin.clock import Clock
from baton.twin.deployment import Deployment
from baton.twin.failures import Failure
from baton.twin.fetches import Fetcher
from baton.twin.gateway import Gateway
from baton.twin.links import Network
from baton.twin.node import Node
from baton.twin.report import Report
from baton.twin.results import RunResult, WorkerResult
from baton.twin.tracing import Tracer
from baton.twin.workload import TraceRequest, check_trace


@contextmanager
def _no_collector() -> Iterator[None]:
    """A run makes millions of objects and hardly a cycle: looking for those would take a tenth of
    its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Simulator:
    """One run. `run` carries it out.

    Raises:
        ConfigError: deployment, trace or failures make no sense; it says what to change.
    """

    def __init__(
        self,
        deployment: Deployment,
        trace: Sequence[TraceRequest],
        *,
        failures: Sequence[Failure] = (),
        router: Router | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        check_trace(trace)
        deployment.check()
        for number, request in enumerate(trace, 1):
            if (reason := deployment.refuses(request)) is not None:
                raise ConfigError(f"request {number} of the trace fits nowhere: {reason}")
        self.clock = Clock()
        self._deployment = deployment
        self._tracer = tracer
        self._network = Network(self.clock, deployment.ports)
        self._fetcher = Fetcher(
            self.clock, self._network, deployment.link, lambda name: self.nodes[name]
        )
        self.nodes: dict[str, Node] = {}
        for setup in deployment.workers:
            if tracer is not None:
                tracer.worker(setup.worker_id)
            node = Node(self.clock, setup, self._fetcher, self._told, tracer, deployment.message_s)
            self.nodes[setup.worker_id] = node
        self.gateway = Gateway(
            self.clock, deployment, self.nodes, trace, Router() if router is None else router
        )
        for failure in failures:
            self._plan(failure)

    def run(self) -> RunResult:
        """Until every request has ended."""
        clock, gateway = self.clock, self.gateway
        with _no_collector():
            while not gateway.is_done:
                clock.next()
        return self._result()

    def _told(self, node: Node, report: Report) -> None:
        self.gateway.hear(node, report)

    # Failures --------------------------------------------------------------------------------

    def _plan(self, failure: Failure) -> None:
        node = self.nodes.get(failure.worker_id)
        if node is None:
            raise ConfigError(
                f"--fail names {failure.worker_id!r}; there are {', '.join(self.nodes)}"
            )
        acts = {"kill": self._kill, "freeze": self._freeze, "slow": self._slow}
        self.clock.at(failure.at_s, lambda: acts[failure.kind](node, failure))

    def _kill(self, node: Node, failure: Failure) -> None:
        if not node.is_alive:
            return
        self._mark(failure)
        node.kill()
        self._fetcher.lost(node.setup.worker_id)
        self.clock.after(self._deployment.detect_s, lambda: self.gateway.loses(node))

        def restart() -> None:
            node.start()
            self.gateway.joins(node)

        wait_s = max(self._deployment.restart_s, self._deployment.detect_s)
        self.clock.after(wait_s, restart)

    def _freeze(self, node: Node, failure: Failure) -> None:
        """If the gateway finds it out meanwhile, its requests go elsewhere until it goes on."""
        if not node.is_alive:
            return
        self._mark(failure)
        node.freeze(failure.for_s)
        if failure.for_s <= self._deployment.freeze_s:
            return

        epoch = node.epoch

        def found_out() -> None:
            if node.is_alive and node.epoch == epoch:
                self.gateway.freezes(node)

        def goes_on() -> None:
            if node.is_alive and node.epoch == epoch:
                self.gateway.thaws(node)

        self.clock.after(self._deployment.freeze_s, found_out)
        self.clock.after(failure.for_s + self._deployment.message_s, goes_on)

    def _slow(self, node: Node, failure: Failure) -> None:
        self._mark(failure)
        port = node.setup.port
        self._network.slow(port, failure.factor)
        self.clock.after(failure.for_s, lambda: self._network.slow(port, 1.0))

    def _mark(self, failure: Failure) -> None:
        if self._tracer is not None:
            self._tracer.mark(f"{failure.kind} {failure.worker_id}", self.clock.now)

    # Result ----------------------------------------------------------------------------------

    def _result(self) -> RunResult:
        records = [record.result() for record in self.gateway.records.values()]
        if self._tracer is not None:
            for each in records:
                first = each.event_s[0] if each.event_s else None
                self._tracer.request(each.index, each.sent_s, first, each.end_s, each.failure)
        end_s = max(record.end_s for record in records)
        return RunResult(
            records,
            [self._worker(node, end_s) for node in self.nodes.values()],
            dict(self.gateway.table.counters),
            end_s,
            self.clock.num_events,
        )

    def _worker(self, node: Node, end_s: float) -> WorkerResult:
        totals, port = node.totals, node.setup.port
        moved = self._network.num_bytes.items()
        return WorkerResult(
            worker_id=node.setup.worker_id,
            role=node.setup.role,
            num_steps=totals.num_steps,
            busy_s=totals.busy_s,
            utilisation=totals.busy_s / end_s if end_s > 0 else 0.0,
            mean_seqs=totals.num_seqs / totals.num_steps if totals.num_steps else 0.0,
            num_tokens=totals.num_tokens,
            num_evicted=node.scheduler.pool.num_evictions,
            counters=dict(node.scheduler.counters),
            bytes_sent=sum(num for (source, _), num in moved if source == port),
            bytes_received=sum(num for (_, reader), num in moved if reader == port),
        )

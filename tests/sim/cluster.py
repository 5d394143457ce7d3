"""A whole deployment on a virtual clock: real core, fake KV, and everything that can go wrong.

    gateway ══messages, in order══▶ worker: inbox ─▶ turn ─▶ step ─▶ report ══▶ gateway
                                      │  └─▶ copies into its store
                                      └────▶ fetches from the stores of others, over links

Schedulers, pools, stores, leases, the router and the gateway's request table are the real ones; the
KV tells lies apart (`sim_engine`). One seed decides everything: sizes, arrivals, how long each step,
copy, message and fetch takes, and the faults. Time is that of an event heap. A stream between the
gateway and a worker belongs to one start of the worker: what one start said, or was told, does not
reach another one. A worker whose request says nothing for long is taken to be frozen, and the
request is placed again.

`Client` holds every stream to the expected tokens; `Cluster.run` ends when every request has, and
then verifies that nothing is left and that nothing fell back unless a fault was injected.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from sim_engine import Client, Frame, SimWorker, expected_tokens, fetch, make_config, make_request

from baton.core.handoff import RequestTable
from baton.core.instructions import Ask, Instruction, Offer, Release, Renew, Submit, Withdraw
from baton.core.life import Content, HandoffPolicy, Life
from baton.core.limits import SchedulerConfig
from baton.core.plan import ExportOrder, ImportOrder, Update
from baton.core.router import Router, WorkerInfo
from baton.errors import Unavailable
from baton.types import FinishReason, Request, Role, TokenDelta

BLOCK_SIZE = 2
LEASE_TTL_S = 2.0
DETECT_S = 0.4
GIVE_UP_S = 3.0
END_S = 600.0
PATIENT = HandoffPolicy(LEASE_TTL_S, max_retries=1 << 30, max_wait_s=END_S)
CONTENT = Content(b"weights", "exact", BLOCK_SIZE)
FAULTS = ("kill", "freeze", "rot", "cut", "slow", "lapse", "copy_fails", "truncate", "abort")


class Node:
    """One worker process: its engine turns, its copies and its fetches."""

    def __init__(self, cluster: Cluster, name: str, role: Role, config: SchedulerConfig) -> None:
        self.cluster = cluster
        self.name = name
        self.role = role
        self.config = config
        self.epoch = 0
        self.known_epoch = 0  # of the start that the gateway's stream goes to
        self.start()

    def start(self) -> None:
        """A new process: a new epoch, nothing in its memory."""
        self.epoch += 1
        depth = 1 + (self.cluster.seed + self.epoch) % 2
        self.worker = SimWorker(self.config, self.name, self.epoch, check=False, depth=depth)
        self.inbox: list[Callable[[], None]] = []
        self.frozen_until = 0.0
        self.busy = False

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

    def _turn(self) -> None:
        inbox, self.inbox = self.inbox, []
        for message in inbox:
            message()
            self._pass_on(self.worker.settle())
        before = self.worker.runner.num_computed
        self._pass_on(self.worker.step(self.cluster.now))
        stepped = self.worker.runner.num_computed > before or self.worker.runner.pending > 0
        self.busy = False
        if stepped or self.inbox:
            self.busy = True
            self.later(self.cluster.seconds(0.01), self._turn)
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
        if update.deltas or update.sealed or update.landed or update.handoffs:
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


class Live:
    """One request, as the client and the watch over stuck ones see it."""

    def __init__(self, client: Client, arrives: float) -> None:
        self.client = client
        self.arrives = arrives
        self.is_placed = False
        self.life: Life | None = None
        self.touched = arrives


class Cluster:
    """One history. `run` carries it out.

    faults: the kinds that may happen, each with a chance drawn from the seed.
    """

    def __init__(self, seed: int, faults: tuple[str, ...] = FAULTS) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.now = 0.0
        self.hits: Counter[str] = Counter()
        self.num_early = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0
        self._last_arrival: dict[tuple[str, str], float] = {}
        rng = self.rng
        self.chances = {kind: rng.choice((0.0, 0.02, 0.1)) for kind in faults}
        self.table = RequestTable(Router(), PATIENT)
        self._wake_at = END_S * 1000
        self.nodes: dict[str, Node] = {}
        self._make_nodes()
        self.lives: dict[str, Live] = {}
        self._make_requests()
        self.lapsed_until = 0.0
        self.at(LEASE_TTL_S / 3, self._watch)
        for kind in ("kill", "freeze", "rot", "lapse", "abort"):
            if self.chances.get(kind):
                self.at(rng.uniform(0, 1.0), lambda kind=kind: self._mishap(kind))

    # Setting up ------------------------------------------------------------------------

    def _make_nodes(self) -> None:
        rng = self.rng
        counts = {Role.PREFILL: rng.randint(1, 2), Role.DECODE: rng.randint(1, 2)}
        if rng.random() < 0.25:
            counts[Role.UNIFIED] = 1
        for role, count in counts.items():
            for number in range(count):
                config = make_config(
                    block_size=BLOCK_SIZE,
                    num_blocks=rng.choice((10, 12, 16, 40)),
                    num_frames=rng.choice((10, 12, 16, 40)),
                    max_num_seqs=rng.randint(2, 8),
                    max_num_batched_tokens=rng.randint(3, 12),
                    lease_ttl_s=LEASE_TTL_S,
                    prefix_cache=rng.random() < 0.9,
                    keep_blocks=rng.random() < 0.7,
                )
                node = Node(self, f"{role.value}-{number}", role, config)
                self.nodes[node.name] = node
                self._join(node)

    def _join(self, node: Node) -> None:
        config = node.config
        node.known_epoch = node.epoch
        info = WorkerInfo(
            node.name,
            node.role,
            node.epoch,
            config.num_blocks,
            BLOCK_SIZE,
            config.num_frames,
            config.keep_blocks,
        )
        self.table.join(info, CONTENT, self.now)
        self._carry_out()

    def _make_requests(self) -> None:
        rng = self.rng
        chats: list[tuple[int, ...]] = []
        for number in range(rng.randint(3, 14)):
            start = rng.choice(chats) if chats and rng.random() < 0.5 else ()
            prompt = (*start, *(rng.randrange(3) for _ in range(rng.randint(1, 9))))[:14]
            max_tokens = rng.randint(1, 5)
            chats.append((*prompt, *expected_tokens(prompt, max_tokens)))
            request = make_request(f"r{number}", prompt, max_tokens)
            live = Live(Client(request), rng.uniform(0, rng.choice((0.1, 1.0))))
            self.lives[request.id] = live
            self.at(live.arrives, lambda live=live: self._place(live))

    # Time, chance and links --------------------------------------------------------------

    def at(self, when: float, action: Callable[[], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._heap, (max(when, self.now), self._num_events, action))

    def seconds(self, mean: float) -> float:
        return self.rng.expovariate(1 / mean)

    def strikes(self, kind: str) -> bool:
        """Whether a fault of this kind happens here and now; if so, it is counted."""
        struck = self.rng.random() < self.chances.get(kind, 0.0)
        self.hits[kind] += struck
        return struck

    def link_s(self, source: Node, reader: Node, num_blocks: int) -> float:
        """Seconds for blocks over a link; a slow one takes for ever."""
        per_block = 2.0 if self.strikes("slow") else 0.002
        return 0.001 + num_blocks * per_block

    def send(self, source: str, target: str, action: Callable[[], None]) -> None:
        """A message of a stream: it arrives after those that were sent before it."""
        arrives = max(self.now + self.seconds(0.001), self._last_arrival.get((source, target), 0.0))
        self._last_arrival[source, target] = arrives
        self.at(arrives, action)

    # The gateway -------------------------------------------------------------------------

    def _place(self, live: Live) -> None:
        """A request comes."""
        if live.client.ended:
            return
        try:
            live.life = self.table.add(live.client.request, self.now)
        except Unavailable:
            self.at(self.now + 0.1, lambda: self._place(live))
            return
        live.touched = self.now
        self._carry_out()

    def _carry_out(self) -> None:
        """Do what the table wants done, and see to it that it is woken in time."""
        outcome = self.table.take()
        for delta in outcome.deltas:
            self._deliver(delta)
        for instruction in outcome.instructions:
            self._instruct(instruction)
        at = self.table.next_deadline()
        if at is not None and at < self._wake_at:
            self._wake_at = at
            self.at(at, self._wake)

    def _wake(self) -> None:
        self._wake_at = END_S * 1000
        self.table.tick(self.now)
        self._carry_out()

    def _instruct(self, instruction: Instruction) -> None:
        def tell(message: Callable[[SimWorker], None]) -> None:
            self._tell(self.nodes[instruction.worker_id], message)

        match instruction:
            case Submit(_, leg):
                self._check_leg(leg)
                tell(lambda worker: worker.scheduler.add(leg, self.now))
            case Withdraw(_, request_id, choice, attempt):
                tell(lambda worker: worker.scheduler.abort((request_id, choice, attempt)))
            case Ask(_, lend):
                tell(lambda worker: worker.scheduler.lend(lend, self.now))
            case Offer(_, sealed):
                tell(lambda worker: worker.scheduler.offer(sealed, self.now))
            case Renew(_, grant_ids):
                if self.now >= self.lapsed_until:
                    tell(lambda worker: worker.scheduler.renew(grant_ids, self.now))
            case Release(_, grant_id):
                tell(lambda worker: worker.scheduler.release((grant_id,)))

    def _tell(self, node: Node, message: Callable[[SimWorker], None]) -> None:
        epoch = node.known_epoch

        def deliver() -> None:
            if node.epoch == epoch:
                node.put(lambda: message(node.worker))

        self.send("gateway", node.name, deliver)

    def _check_leg(self, leg: Request) -> None:
        """A leg goes on where the client is, under an attempt of its own."""
        live = self.lives[leg.id]
        client, before = live.client, live.client.request
        assert not client.ended, "a leg after the end"
        assert leg.emitted == tuple(client.received), "not what the client has"
        if leg.handoff is not None:
            client.take_handoff(leg.handoff)
            client.handoff = None
            assert leg.attempt == before.attempt
        elif live.is_placed:
            assert leg.attempt > before.attempt, "placed again under the same attempt"
        live.is_placed = True
        client.request, client.leg_ended = leg, False
        live.touched = self.now

    def _watch(self) -> None:
        """Whoever is stuck is placed again."""
        self.at(self.now + LEASE_TTL_S / 3, self._watch)
        for live in self.lives.values():
            stuck = live.life is not None and self.now - live.touched > GIVE_UP_S
            if stuck and not live.client.ended:
                live.touched = self.now
                self.table.give_up(live.client.request.id, 0, self.now)
                self._carry_out()

    def to_gateway(self, node: Node, update: Update) -> None:
        epoch, table = node.epoch, self.table

        def deliver() -> None:
            if epoch != node.known_epoch:
                return
            for sealed in update.sealed:
                table.sealed(node.name, sealed, self.now)
                live = self.lives[sealed.request_id]
                if live.client.request.attempt == sealed.attempt:
                    live.touched = self.now
            for landed in update.landed:
                table.landed(landed)
            for times in update.times:
                table.timed(node.name, times)
            for delta in update.deltas:
                table.delivered(node.name, delta, self.now)
            for handoff in update.handoffs:
                table.handed_off(node.name, handoff, self.now)
            self._carry_out()

        self.send(node.name, "gateway", deliver)

    def _deliver(self, delta: TokenDelta) -> None:
        live = self.lives[delta.request_id]
        client = live.client
        assert live.life is not None
        assert delta.attempt == client.request.attempt, "another attempt's"
        live.touched = self.now
        first = not client.received
        client.take(delta)
        if delta.token_ids and first:
            self.num_early += live.life.num_early_blocks
        if delta.finish is FinishReason.ERROR:
            assert delta.error is not None
            assert delta.error.code == "transfer_failed", delta.error
            assert self.hits["copy_fails"], "an error without a reason"

    # Mishaps -------------------------------------------------------------------------------

    def _mishap(self, kind: str) -> None:
        if all(live.client.ended for live in self.lives.values()):
            return
        if self.rng.random() < 5 * self.chances[kind]:
            self.hits[kind] += 1
            getattr(self, f"_{kind}")(self.rng.choice(list(self.nodes.values())))
        if self.now < END_S / 4:  # then peace, so that everything can end
            self.at(self.now + self.rng.uniform(0.1, 1.5), lambda: self._mishap(kind))

    def _kill(self, node: Node) -> None:
        """The process is gone and a new one takes its place; the gateway notices a moment later."""
        node.start()

        def noticed() -> None:
            if node.known_epoch != node.epoch:
                self.table.lose(node.name, self.now)
                self._carry_out()
                self._join(node)

        self.at(self.now + DETECT_S, noticed)

    def _freeze(self, node: Node) -> None:
        node.frozen_until = self.now + self.rng.choice((0.5, 5.0))

    def _rot(self, node: Node) -> None:
        """A stored block goes bad in place."""
        frames = node.worker.store.frames
        filled = [number for number, frame in enumerate(frames) if frame.key]
        if filled:
            number = self.rng.choice(filled)
            frame = frames[number]
            frames[number] = Frame(frame.key, [(t ^ 1, p, c) for t, p, c in frame.slots])

    def _lapse(self, node: Node) -> None:
        """The gateway does not come to renew for a while."""
        self.lapsed_until = self.now + 3 * LEASE_TTL_S

    def _abort(self, node: Node) -> None:
        alive = [live for live in self.lives.values() if not live.client.ended]
        if alive:
            live = self.rng.choice(alive)
            live.client.aborted = True
            self.table.abandon(live.client.request.id, 0, self.now)
            self._carry_out()

    # Running it ----------------------------------------------------------------------------

    def run(self) -> Counter[str]:
        """Carry the history out; returns the counters of all workers and the faults that hit.

        Raises:
            AssertionError: an invariant does not hold.
        """
        while not all(live.client.ended for live in self.lives.values()):
            assert self.now < END_S, "a request never ended"
            self._advance()
        quiet = self.now + 20 * LEASE_TTL_S  # leases that a fault orphaned run out
        while self._heap and self._heap[0][0] < quiet:
            self._advance()
        return self._check_end()

    def _advance(self) -> None:
        self.now, _, action = heapq.heappop(self._heap)
        action()

    def _check_end(self) -> Counter[str]:
        totals: Counter[str] = Counter({f"hit_{kind}": n for kind, n in self.hits.items()})
        totals["early_in_time"] = self.num_early
        for node in self.nodes.values():
            worker = node.worker
            worker.scheduler.schedule(self.now + 1000.0)
            worker.settle()
            worker.check_empty()
            totals.update(worker.scheduler.counters)
        totals.update(self.table.counters)
        assert not len(self.table), "a request was not forgotten"
        if not sum(self.hits.values()):
            kinds = ("fallback_", "leases_expired", "late_renewals", "placed_again")
            bad = {name: n for name, n in totals.items() if name.startswith(kinds) and n}
            assert not bad, f"without a fault: {bad}"
        return totals


def simulate(seed: int, **options: Any) -> Counter[str]:
    """One history; its failure names the seed that brings it back."""
    try:
        return Cluster(seed, **options).run()
    except Exception as error:
        where = f"seed {seed}: {type(error).__name__}: {error}"
        raise AssertionError(f"{where} (python -m sim.run --seed {seed})") from error

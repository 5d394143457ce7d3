"""A whole deployment on a virtual clock: real core, fake KV, and everything that can go wrong.

    gateway ══messages, in order══▶ worker: inbox ─▶ turn ─▶ step ─▶ report ══▶ gateway
                                      │  └─▶ copies into its store
                                      └────▶ fetches from the stores of others, over links

Schedulers, pools, stores, leases, router and the gateway's request table are the real ones; the KV
tells lies apart (`sim_engine`). One seed decides everything: sizes, arrivals, how long each step,
copy, message and fetch takes, and the faults. Time is that of an event heap. A stream between the
gateway and a worker belongs to one start of the worker: what one start said, or was told, does not
reach another one. Workers tell that they are alive, and who stands still is found out by
`core.liveness`: the whole process (`freeze`), its engine alone (`hang`), or only seemingly, as no
message passes between it and the gateway (`part`); a step that is merely long is no fault. A
poisoned request takes its worker along at some token, with last words or without, and may do so
twice; but where nothing passes, a worker's last words may come too late. A fetch may `stall`: it is
not acknowledged until long after its deadline, and writes to its blocks until then.

`Client` holds every stream to the expected tokens; `Cluster.run` ends when every request has, and
then verifies that nothing is left and that nothing fell back unless a fault was injected.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from sim.node import BEAT_S, Node
from sim_engine import Client, Frame, SimWorker, expected_tokens, make_config, make_request

from baton.core.handoff import RequestTable
from baton.core.instructions import (
    Ask,
    Instruction,
    Offer,
    Proceed,
    Release,
    Renew,
    Submit,
    Withdraw,
)
from baton.core.life import Content, HandoffPolicy, Life
from baton.core.liveness import Liveness
from baton.core.plan import Update
from baton.core.router import Router, WorkerInfo
from baton.core.sequence import SequenceId
from baton.errors import Unavailable
from baton.types import FinishReason, Pulse, Request, Role, TokenDelta

BLOCK_SIZE = 2
LEASE_TTL_S = 2.0
DETECT_S = 0.4
PATIENCE_S = 0.6
LONG_STEP_S = 1.0
END_S = 600.0
PATIENT = HandoffPolicy(LEASE_TTL_S, max_retries=1 << 30, max_wait_s=END_S)
CONTENT = Content(b"weights", "exact", BLOCK_SIZE)
FAULTS = (
    "kill", "freeze", "hang", "part", "poison", "rot", "cut", "slow", "lapse", "copy_fails",
    "truncate", "abort", "stall", "wordless",
)  # fmt: skip


class Live:
    """One request, as its client sees it."""

    def __init__(self, client: Client, arrives: float) -> None:
        self.client = client
        self.arrives = arrives
        self.is_placed = False
        self.life: Life | None = None


class Cluster:
    """One history. `run` carries it out.

    faults: the kinds that may happen, each with a chance drawn from the seed.
    """

    def __init__(self, seed: int, faults: tuple[str, ...] = FAULTS) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.now = 0.0
        self.hits: Counter[str] = Counter()
        self.num_crashes: Counter[str] = Counter()  # steps that a request was in
        self.was_alone: set[str] = set()  # requests, when their worker was killed
        self.num_early = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0
        self._last_arrival: dict[tuple[str, str], float] = {}
        rng = self.rng
        self.chances = {kind: rng.choice((0.0, 0.02, 0.1)) for kind in faults}
        self.long_chance = rng.choice((0.0, 0.0, 0.01))
        self.poison: dict[str, int] = {}
        self.wordless_share = rng.choice((0.0, 0.5, 1.0))
        self.table = RequestTable(Router(), PATIENT)
        self.liveness = Liveness(PATIENCE_S)
        self._wake_at = END_S * 1000
        self.nodes: dict[str, Node] = {}
        self._make_nodes()
        self.lives: dict[str, Live] = {}
        self._make_requests()
        self.lapsed_until = 0.0
        self.at(BEAT_S, self._look)
        for kind in ("kill", "freeze", "hang", "part", "rot", "lapse", "abort"):
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
        self.liveness.joined(node.name, self.now)
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
            if rng.random() < self.chances.get("poison", 0.0):
                self.poison[request.id] = rng.randrange(len(prompt) + max_tokens - 1)
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

    def step_s(self) -> float:
        """Some steps are long, and that is no fault."""
        return LONG_STEP_S if self.rng.random() < self.long_chance else self.seconds(0.01)

    def link_s(self, source: Node, reader: Node, num_blocks: int) -> float:
        """Seconds for blocks over a link; a slow one takes for ever."""
        per_block = 2.0 if self.strikes("slow") else 0.002
        return 0.001 + num_blocks * per_block

    def send(self, source: str, target: str, action: Callable[[], None]) -> None:
        """A message of a stream: it arrives after those that were sent before it."""
        node = self.nodes[source if target == "gateway" else target]
        arrives = max(self.now + self.seconds(0.001), self._last_arrival.get((source, target), 0.0))
        arrives = max(arrives, node.parted_until)
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
            case Submit(worker_id, leg):
                assert worker_id not in self.liveness.frozen(), "placed where nothing moves"
                self._check_leg(leg)
                tell(lambda worker: worker.scheduler.add(leg, self.now))
            case Withdraw(_, request_id, choice, attempt):
                tell(lambda worker: worker.scheduler.abort((request_id, choice, attempt)))
            case Proceed(_, request_id, choice, attempt):
                tell(lambda worker: worker.scheduler.proceed((request_id, choice, attempt)))
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

    def _look(self) -> None:
        """Whoever stands still loses its requests to others."""
        if not self.is_over:
            self.at(self.now + BEAT_S, self._look)
        for name, _, stuck_at in self.liveness.check(self.now):
            self.table.freeze(name, self.now, stuck_at)
            self._carry_out()

    def hear(self, node: Node, pulse: Pulse) -> None:
        epoch = node.epoch

        def deliver() -> None:
            if epoch == node.known_epoch and self.liveness.heard(node.name, pulse, self.now):
                self.table.thaw(node.name, self.now)
                self._carry_out()

        self.send(node.name, "gateway", deliver)

    def to_gateway(self, node: Node, update: Update) -> None:
        epoch, table = node.epoch, self.table

        def deliver() -> None:
            if epoch != node.known_epoch:
                return
            for sealed in update.sealed:
                table.sealed(node.name, sealed, self.now)
            for landed in update.landed:
                table.landed(landed)
            for times in update.times:
                table.timed(node.name, times)
            for delta in update.deltas:
                table.delivered(node.name, delta, self.now)
            for handoff in update.handoffs:
                table.handed_off(node.name, handoff, self.now)
            for told in update.alone:
                seq_id = (told.request_id, told.choice, told.attempt)
                table.alone(node.name, seq_id, told.begins)
            self._carry_out()

        self.send(node.name, "gateway", deliver)

    def _deliver(self, delta: TokenDelta) -> None:
        live = self.lives[delta.request_id]
        client = live.client
        assert live.life is not None
        assert delta.attempt == client.request.attempt, "another attempt's"
        first = not client.received
        client.take(delta)
        if delta.token_ids and first:
            self.num_early += live.life.num_early_blocks
        if delta.finish is FinishReason.ERROR:
            assert delta.error is not None
            if delta.error.code == "worker_lost":
                # Whoever is stuck twice may be the cause; only a poisoned one takes workers along.
                # One that was alone when its worker was killed cannot be told from that.
                suspects = {*self.poison, *self.was_alone}
                guilty = delta.request_id in suspects or self.hits["hang"] > 1
                assert guilty or self.hits["part"], "an innocent request ended for another"
                return
            assert delta.error.code == "transfer_failed", delta.error
            assert self.hits["copy_fails"], "an error without a reason"

    # Mishaps -------------------------------------------------------------------------------

    def _mishap(self, kind: str) -> None:
        if self.is_over:
            return
        if self.rng.random() < 5 * self.chances[kind]:
            self.hits[kind] += 1
            getattr(self, f"_{kind}")(self.rng.choice(list(self.nodes.values())))
        if self.now < END_S / 4:  # then peace, so that everything can end
            self.at(self.now + self.rng.uniform(0.1, 1.5), lambda: self._mishap(kind))

    def _kill(self, node: Node) -> None:
        only = node.worker.scheduler.books.suspects.running()
        if only is not None and only.leave is not None:
            self.was_alone.add(only.id[0])
        self.starts_anew(node, None)

    def crashed(self, node: Node, batch: tuple[SequenceId, ...]) -> None:
        """A poisoned step takes it along."""
        self.hits["poison"] += 1
        for seq_id in batch:
            self.num_crashes[seq_id[0]] += 1
        wordless = self.rng.random() < self.wordless_share
        self.hits["wordless"] += wordless
        self.starts_anew(node, None if wordless else batch)

    def starts_anew(self, node: Node, suspects: tuple[SequenceId, ...] | None) -> None:
        """The process is gone and a new one takes its place; the gateway notices a moment later.

        suspects: those that it names, with its last words; None: it says nothing any more.
        """
        node.last_words[node.epoch] = suspects
        node.start()

        def noticed() -> None:
            if node.known_epoch != node.epoch:
                self.liveness.left(node.name)
                self.table.lose(node.name, self.now, node.last_words[node.known_epoch])
                self._carry_out()
                self._join(node)

        # Its stream ends with what it had said.
        self.at(self.now + DETECT_S, lambda: self.send(node.name, "gateway", noticed))

    def _freeze(self, node: Node) -> None:
        node.frozen_until = self.now + self.rng.choice((0.5, 5.0))

    def _hang(self, node: Node) -> None:
        """The engine's thread alone."""
        node.hung_until = self.now + self.rng.choice((0.3, 3.0))

    def _part(self, node: Node) -> None:
        """Nothing passes between it and the gateway; it goes on, and all arrives in the end."""
        node.parted_until = self.now + self.rng.choice((0.5, 5.0))

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

    @property
    def is_over(self) -> bool:
        return all(live.client.ended for live in self.lives.values())

    def run(self) -> Counter[str]:
        """Carry the history out; returns the counters of all workers and the faults that hit.

        Raises:
            AssertionError: an invariant does not hold.
        """
        while not self.is_over:
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
        for request_id in self.poison if not self.hits["part"] else ():
            assert self.num_crashes[request_id] <= 2, "a poisoned request took a third worker along"
        if not sum(self.hits.values()):
            kinds = ("fallback_", "leases_expired", "late_renewals", "placed_again", "workers_")
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

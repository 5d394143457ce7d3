"""A Hypothesis machine: a prefill worker, a decode worker and a careless gateway.

The workers are the real core over fake KV (`sim_engine`). Requests come with shared prefixes,
tenants, stop tokens and deadlines, whole or split; copies and fetches end late, in any order and
badly; clients abort; the gateway places again, repeats itself and mixes handoffs up. Whatever
happens, `Client` holds every stream to the expected tokens, and in the end nothing is left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from sim_engine import Client, Frame, SimWorker, expected_tokens, make_config, make_request

from baton.core.keys import chain, extend_chain, root_key
from baton.core.life import Content
from baton.core.limits import SchedulerConfig
from baton.core.offers import Offers
from baton.core.plan import Update
from baton.core.sequence import Status
from baton.types import FinishReason, Handoff, Lend, Request, Sealed

SEGMENTS = ((1, 1), (2, 2), (1, 1, 2, 2), (2, 2, 1, 1), (3,))
SPOILS = ("missing", "corrupt", "stale_epoch", "timed_out")
MAX_PROMPT = 10

prompts = (
    st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=4)
    .map(lambda parts: tuple(t for part in parts for t in part)[:MAX_PROMPT])
    .filter(bool)
)
picks = st.integers(0, 1 << 16)


class Order(NamedTuple):
    """What a client wants, and where the gateway sends it."""

    prompt: tuple[int, ...]
    max_tokens: int
    stop_at: int
    salt: bytes
    split: bool
    on_decode: bool
    borrow: bool
    deadline_s: float | None


orders = st.builds(
    Order,
    prompt=prompts,
    max_tokens=st.integers(1, 8),
    stop_at=st.integers(0, 16),
    salt=st.sampled_from((b"", b"", b"tenant")),
    split=st.integers(0, 2).map(bool),
    on_decode=st.booleans(),
    borrow=st.booleans(),
    deadline_s=st.sampled_from((None, None, None, 3.0)),
)


class ServingMachine(RuleBasedStateMachine):
    """Configure by the class attributes; `check` verifies books after every call."""

    prefill_config: SchedulerConfig = make_config(
        num_blocks=9,
        num_frames=9,
        max_num_seqs=4,
        max_num_batched_tokens=5,
        lease_ttl_s=5.0,
        keep_blocks=True,
    )
    decode_config: SchedulerConfig = make_config(
        num_blocks=10,
        num_frames=8,
        max_num_seqs=4,
        max_num_batched_tokens=7,
        lease_ttl_s=5.0,
        keep_blocks=True,
    )
    check = True
    alike = True
    """Whether the workers have the same keys; if not, what is offered is recast."""
    depth = 1
    max_settle_steps = 600

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.prefill = SimWorker(self.prefill_config, "prefill", check=self.check, depth=self.depth)
        self.decode = SimWorker(self.decode_config, "decode", check=self.check, depth=self.depth)
        self.clients: dict[str, Client] = {}
        self.home: dict[str, SimWorker] = {}
        self.grants: dict[str, list[str]] = {}
        self.lent: list[Sealed] = []
        self.early = True  # whether what is sealed is offered to the decode worker
        self.seen: list[Handoff] = []
        self.offers: dict[tuple[str, int, int], Offers] = {}  # of unlike workers
        self.disturbed = False  # a fault was injected: fallbacks are allowed
        self.export_failed = False

    # Helpers -----------------------------------------------------------------------------------

    def absorb(self, worker: SimWorker, update: Update) -> None:
        for delta in update.deltas:
            client = self.clients[delta.request_id]
            client.take(delta)
            if delta.finish is FinishReason.ERROR:
                assert delta.error is not None
                late = client.request.deadline_s is not None
                assert delta.error.code in ("deadline_exceeded", "transfer_failed")
                assert delta.error.code != "deadline_exceeded" or late
                assert delta.error.code != "transfer_failed" or self.export_failed
        for sealed in update.sealed:
            self.grants[sealed.request_id].append(sealed.grant.grant_id)
            client = self.clients[sealed.request_id]
            if client.id != (sealed.request_id, sealed.choice, sealed.attempt):
                continue
            if sealed.grant.source == "decode":
                self.lent.append(sealed)
            elif self.early and (offered := self.offered(client, sealed)):
                self.decode.scheduler.offer(offered, self.now)
                self.absorb(self.decode, self.decode.settle())
        for told in update.alone if update.alone else ():
            if told.begins:  # a gateway answers, sooner or later
                worker.scheduler.proceed((told.request_id, told.choice, told.attempt))
        for handoff in update.handoffs:
            self.grants[handoff.request_id].append(handoff.grant.grant_id)
            self.seen.append(handoff)
            client = self.clients[handoff.request_id]
            if handoff.attempt == client.request.attempt:
                client.take_handoff(handoff)

    def offered(self, client: Client, sealed: Sealed) -> Sealed | None:
        """What a gateway makes of it, for the decode worker."""
        if self.alike:
            return sealed
        if client.id not in self.offers:
            contents = [
                Content(c.fingerprint, c.numerics, c.kv_format.block_size, c.kv_format)
                for c in (self.prefill_config, self.decode_config)
            ]
            self.offers[client.id] = Offers(*contents, client.request.salt, extend_chain)
        return self.offers[client.id].add(sealed, (*client.request.prompt, *client.received))

    def send(self, worker: SimWorker, request: Request) -> None:
        self.home[request.id] = worker
        worker.scheduler.add(request, self.now)
        self.absorb(worker, worker.settle())

    def pick(self, pick: int, wanted: Callable[[Client], bool]) -> Client | None:
        found = [client for client in self.clients.values() if wanted(client)]
        return found[pick % len(found)] if found else None

    def waits_for_decode(self, client: Client) -> bool:
        return bool(client.handoff) and client.leg_ended and not client.ended

    def forward(self, client: Client, handoff: Handoff | None) -> None:
        client.handoff = None
        self.send(self.decode, client.next_leg(hand_off=False, handoff=handoff))

    # Rules -------------------------------------------------------------------------------------

    @initialize(orders=st.lists(orders, min_size=2, max_size=6))
    def begin(self, orders: list[Order]) -> None:
        for order in orders:
            self.submit(order)

    @rule(order=orders)
    def submit(self, order: Order) -> None:
        drawn = expected_tokens(order.prompt, order.max_tokens, order.salt)
        name = f"r{len(self.clients)}"
        request = make_request(
            name,
            order.prompt,
            order.max_tokens,
            stop=drawn[order.stop_at : order.stop_at + 1],
            salt=order.salt,
            hand_off=order.split,
            deadline_s=order.deadline_s,
        )
        client = self.clients[name] = Client(request)
        self.grants[name] = []
        on_decode = order.on_decode and not order.split
        if order.borrow and not on_decode:
            request = client.next_leg(prefix=self.borrow(client))
        self.send(self.decode if on_decode else self.prefill, request)

    @precondition(lambda self: any(client.finish for client in self.clients.values()))
    @rule(pick=picks, order=orders)
    def next_turn(self, pick: int, order: Order) -> None:
        """A chat goes on: the prefill worker borrows what the decode worker has kept of it."""
        client = self.pick(pick, lambda client: client.finish is not None)
        assert client is not None
        self.copy(0, len(self.decode.exports))
        history = (*client.request.prompt, *client.received)[:MAX_PROMPT]
        salt = client.request.salt
        self.submit(order._replace(prompt=history, salt=salt, on_decode=False, borrow=True))

    def borrow(self, client: Client) -> Sealed:
        """Ask the decode worker for what it has of the prompt."""
        request, config = client.request, self.decode_config
        root = root_key(config.fingerprint, config.numerics, request.salt)
        keys = chain(root, request.prompt, config.kv_format.block_size)
        ask = Lend(*client.id, request.tenant, 0, tuple(keys))
        self.decode.scheduler.lend(ask, self.now)
        self.absorb(self.decode, self.decode.settle())
        return self.lent.pop()

    @rule(on_decode=st.booleans(), count=st.integers(1, 4))
    def step(self, on_decode: bool, count: int) -> None:
        worker = self.decode if on_decode else self.prefill
        for _ in range(count):
            self.absorb(worker, worker.step(self.now))

    @rule(keep=st.booleans())
    def prefill_round(self, keep: bool) -> None:
        """A good stretch on the prefill side: most handoffs come out of this."""
        for _ in range(3):
            self.absorb(self.prefill, self.prefill.step(self.now))
            while len(self.prefill.exports) > keep:
                self.absorb(self.prefill, self.prefill.finish_export(-1, self.now))

    @rule(order=orders, pick=picks)
    def decode_crowd(self, order: Order, pick: int) -> None:
        """Several handoffs and a whole request reach the decode worker at once."""
        for client in list(self.clients.values()):
            if self.waits_for_decode(client):
                self.forward(client, client.handoff)
        self.absorb(self.decode, self.decode.step(self.now))
        if pick % 2:
            self.submit(order._replace(split=False, on_decode=True))

    @rule(pick=picks, count=st.integers(1, 3))
    def copy(self, pick: int, count: int) -> None:
        for worker in (self.prefill, self.decode):
            for _ in range(min(count, len(worker.exports))):
                position = pick % len(worker.exports)
                self.absorb(worker, worker.finish_export(position, self.now))

    @rule(yes=st.booleans())
    def offer_early(self, yes: bool) -> None:
        self.early = yes

    @precondition(lambda self: self.prefill.exports)
    @rule(pick=picks, rare=st.integers(0, 4))
    def copy_fails(self, pick: int, rare: int) -> None:
        if rare == 0:
            self.disturbed = self.export_failed = True
            position = pick % len(self.prefill.exports)
            self.absorb(self.prefill, self.prefill.finish_export(position, self.now, ok=False))

    @precondition(lambda self: any(map(self.waits_for_decode, self.clients.values())))
    @rule(pick=picks)
    def hand_over(self, pick: int) -> None:
        client = self.pick(pick, self.waits_for_decode)
        assert client is not None
        self.forward(client, client.handoff)

    @precondition(lambda self: any(map(self.waits_for_decode, self.clients.values())))
    @rule(pick=picks, other=picks)
    def hand_over_mixed_up(self, pick: int, other: int) -> None:
        """The commit record is that of another request, even of one as long."""
        client = self.pick(pick, self.waits_for_decode)
        assert client is not None
        assert client.handoff is not None
        name, num_tokens = client.request.id, client.handoff.num_tokens
        wrong = [h for h in self.seen if h.request_id != name and h.num_tokens == num_tokens]
        if wrong:
            self.disturbed = True
            self.forward(client, wrong[other % len(wrong)])

    def fetching(self, pick: int) -> tuple[SimWorker, SimWorker]:
        """A worker that fetches, and its peer."""
        pairs = [(self.decode, self.prefill), (self.prefill, self.decode)]
        pairs = [pair for pair in pairs if pair[0].imports]
        return pairs[pick % len(pairs)]

    @precondition(lambda self: self.decode.imports or self.prefill.imports)
    @rule(pick=picks)
    def fetch(self, pick: int) -> None:
        worker, peer = self.fetching(pick)
        position = pick % len(worker.imports)
        self.absorb(worker, worker.finish_import(position, peer, self.now))

    @precondition(lambda self: self.decode.imports or self.prefill.imports)
    @rule(pick=picks, first_bad=st.integers(0, 2), reason=st.sampled_from(SPOILS))
    def fetch_fails(self, pick: int, first_bad: int, reason: str) -> None:
        self.disturbed = True
        worker, peer = self.fetching(pick)

        def spoil(results: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(reason if i == first_bad else word for i, word in enumerate(results))

        position = pick % len(worker.imports)
        self.absorb(worker, worker.finish_import(position, peer, self.now, spoil))

    @precondition(lambda self: any(frame.key for frame in self.prefill.store.frames))
    @rule(pick=picks, header=st.booleans())
    def rot(self, pick: int, header: bool) -> None:
        """A stored block goes bad: another block's content, under the old or its own header."""
        frames = [frame for frame in self.prefill.store.frames if frame.key]
        frame, other = frames[pick % len(frames)], frames[pick // 7 % len(frames)]
        self.disturbed = True
        self.prefill.store.frames[self.prefill.store.frames.index(frame)] = Frame(
            other.key if header else frame.key, [(t ^ 1, p, c) for t, p, c in other.slots]
        )

    @precondition(lambda self: self.clients)
    @rule(pick=picks, where=st.sampled_from(("any", "transfer", "transfer", "preempted")))
    def abort(self, pick: int, where: str) -> None:
        client = self.pick(pick, lambda client: self.is_at(client, where))
        if client is None or (where == "any" and pick % 3):
            return
        client.aborted = True
        worker = self.home[client.request.id]
        worker.scheduler.abort(client.id)
        self.absorb(worker, worker.settle())
        if pick % 2:  # whoever waits takes the blocks
            self.absorb(worker, worker.step(self.now))

    def is_at(self, client: Client, where: str) -> bool:
        if client.ended or where == "any":
            return not client.ended
        seq = self.home[client.request.id].scheduler.books.sequences.get(client.id)
        if seq is None:
            return False
        if where == "preempted":
            return seq.status is Status.WAITING and seq.num_preemptions > 0
        return seq.status in (Status.IMPORTING, Status.EXPORTING)

    @precondition(lambda self: self.clients)
    @rule(pick=picks, on_decode=st.booleans(), rare=st.integers(0, 2))
    def place_again(self, pick: int, on_decode: bool, rare: int) -> None:
        client = self.pick(pick, lambda client: not client.ended)
        if client is None or rare:
            return
        old = self.home[client.request.id]
        new = self.decode if on_decode else self.prefill
        if new is not old:
            old.scheduler.abort(client.id)
            self.absorb(old, old.settle())
        handoff = client.request.handoff if on_decode else None
        request = client.next_leg(
            hand_off=False,
            handoff=handoff,
            attempt=client.request.attempt + 1,
            alone=pick % 2 == 1,
        )
        client.handoff = None
        if handoff is None:
            # Nobody will read that any more. To go on renewing would be a deadlock: this request
            # may queue behind one that waits for those frames.
            self.release(request.id)
        if (
            handoff is not None
            and handoff.num_tokens != len(request.prompt) + len(request.emitted) - 1
        ):
            self.disturbed = True  # it covers another number of tokens, and is refused
        if handoff is not None and not set(self.grants[request.id]) & set(
            self.prefill.leases._leases
        ):
            self.disturbed = True
        self.send(new, request)

    @precondition(lambda self: self.clients)
    @rule(pick=picks, older=st.integers(0, 1))
    def repeat(self, pick: int, older: int) -> None:
        """The same request comes again, or an attempt that was given up comes late."""
        client = self.pick(pick, lambda client: client.request.attempt >= older)
        if client is None:
            return
        request = client.request
        fields = {name: getattr(request, name) for name in request.__struct_fields__}
        late = Request(**{**fields, "attempt": request.attempt - older})
        worker = self.home[request.id]
        num_sequences = worker.scheduler.num_sequences
        worker.scheduler.add(late, self.now)
        update = worker.settle()
        assert not update.deltas
        assert worker.scheduler.num_sequences == num_sequences, "an old attempt runs again"

    @rule(seconds=st.sampled_from((0.5, 2.0, 4.0)), renew=st.integers(0, 3))
    def tick(self, seconds: float, renew: int) -> None:
        self.now += seconds
        if renew:
            self.renew()
        else:
            self.disturbed = True

    def renew(self) -> None:
        alive = [
            grant
            for name, grants in self.grants.items()
            for grant in grants
            if not self.clients[name].ended
        ]
        for worker in (self.prefill, self.decode):
            mine = [grant for grant in alive if grant in worker.leases]
            worker.scheduler.renew(tuple(mine), self.now)

    def release(self, name: str) -> None:
        for worker in (self.prefill, self.decode):
            worker.scheduler.release(tuple(self.grants[name]))

    @rule()
    def release_ended(self) -> None:
        for name, client in self.clients.items():
            if client.ended:
                self.release(name)
        for worker in (self.prefill, self.decode):
            self.absorb(worker, worker.settle())

    # The end -----------------------------------------------------------------------------------

    def teardown(self) -> None:
        for _ in range(self.max_settle_steps):
            if all(client.ended for client in self.clients.values()):
                break
            self.now += 0.01
            self.renew()
            for worker, peer in ((self.prefill, self.decode), (self.decode, self.prefill)):
                while worker.exports:
                    self.absorb(worker, worker.finish_export(-1, self.now))
                while worker.imports:
                    self.absorb(worker, worker.finish_import(-1, peer, self.now))
            for client in self.clients.values():
                if self.waits_for_decode(client):
                    self.forward(client, client.handoff)
            self.release_ended()
            for worker in (self.prefill, self.decode):
                self.absorb(worker, worker.step(self.now))
        else:
            raise AssertionError("a request never ended")
        self.early = False
        for worker, peer in ((self.prefill, self.decode), (self.decode, self.prefill)):
            self.absorb(worker, worker.step(self.now))
            self.absorb(worker, worker.finish_steps(self.now))
            while worker.exports:
                self.absorb(worker, worker.finish_export(0, self.now))
            while worker.imports:
                self.absorb(worker, worker.finish_import(0, peer, self.now))
            self.absorb(worker, worker.step(self.now))
            self.absorb(worker, worker.finish_steps(self.now))
        for name in self.grants:
            self.release(name)
        for worker in (self.prefill, self.decode):
            worker.check_empty()
            counters = worker.scheduler.counters
            if not self.disturbed:
                assert not worker.num_fallbacks(), counters

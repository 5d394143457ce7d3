"""A gateway, a prefill worker and a decode worker as one state with named transitions.

The workers are real schedulers, pools, stores and leases over fake KV (`sim_engine`); the gateway
is a plain one that keeps the rules of the design. Each pair of gateway and worker is joined by a
channel in each direction that keeps its order and is cut by a crash. One request with a prompt of
two blocks goes through. What may go wrong is bounded by `budget`: one entry a kind.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Hashable, Iterator
from typing import Any

from sim_engine import Client, Frame, SimWorker, make_config, make_request

from baton.core.sequence import Status
from baton.types import FinishReason, Handoff, Request, Sealed, TokenDelta

PROMPT = (1, 2, 3)  # one full block and a partial one
TTL_TICKS = 3
CONFIG = make_config(
    num_blocks=4,
    num_frames=2,
    max_num_seqs=2,
    max_num_batched_tokens=2,
    lease_ttl_s=float(TTL_TICKS),
)
Message = tuple[Any, ...]


class World:
    """One state. `actions` names what can happen next, `act` makes it happen and verifies."""

    def __init__(self, budget: dict[str, int]) -> None:
        self.now = 1.0
        self.budget = Counter(budget)
        self.prefill = SimWorker(CONFIG, "prefill", 1)
        self.decode = SimWorker(CONFIG, "decode", 1)
        self.to_prefill: list[Message] = []
        self.from_prefill: list[TokenDelta | Handoff | Sealed] = []
        self.to_decode: list[Message] = []
        self.from_decode: list[TokenDelta | Handoff | Sealed] = []
        self.client = Client(make_request("r", PROMPT, 2, hand_off=True))
        self.on_decode = False
        self.grants: list[str] = []
        self.first = self.client.request
        self.newest = -1  # attempt that this start of the prefill worker has been given
        self.to_prefill.append(("add", self.first))

    def copy(self) -> World:
        """Independent of this one; what is never changed is shared."""
        shared = [CONFIG, CONFIG.kv_format, self.first, self.client.request, self.client.expected]
        shared += [m for channel in (self.to_prefill, self.to_decode) for m in channel]
        shared += [*self.from_prefill, *self.from_decode]
        for worker in (self.prefill, self.decode):
            shared += [seq.request for seq in worker.scheduler.books.sequences.values()]
            shared += [*worker.exports, *worker.imports]
            shared += worker.kv.blocks + worker.store.frames + [worker.runner]
            shared += worker.scheduler.fetches.imports._orders.values()
            shared += worker.scheduler.fetches.early._orders.values()
        copied = copy.deepcopy(self, {id(thing): thing for thing in shared})
        for worker in (copied.prefill, copied.decode):
            worker.runner = copy.copy(worker.runner)
            worker.runner.kv = worker.kv
            worker.runner._work = []
        return copied

    # What can happen ---------------------------------------------------------------------------

    def progress(self) -> Iterator[tuple[str, int]]:
        """What happens by itself sooner or later."""
        for name in ("to_prefill", "from_prefill", "to_decode", "from_decode"):
            if getattr(self, name):
                yield (name, 0)
        for name in ("prefill", "decode"):
            worker: SimWorker = getattr(self, name)
            if any(
                seq.status in (Status.WAITING, Status.RUNNING)
                for seq in worker.scheduler.books.sequences.values()
            ):
                yield (f"step_{name}", 0)
        for position in range(len(self.prefill.exports)):
            yield ("copied", position)
        for position in range(len(self.decode.imports)):
            yield ("fetched", position)

    def mishaps(self) -> Iterator[tuple[str, int]]:
        """What may happen or not."""
        for kind, left in self.budget.items():
            if left <= 0:
                continue
            if kind == "copy_fails":
                yield from ((kind, position) for position in range(len(self.prefill.exports)))
            elif kind == "rot":
                frames = self.prefill.store.frames
                yield from ((kind, i) for i, frame in enumerate(frames) if frame.key)
            elif kind == "repeat":
                if self.prefill.leases.epoch == 1:
                    yield (kind, 0)
            elif kind in ("abort", "give_up"):
                if not self.client.ended:
                    yield (kind, 0)
            else:
                yield (kind, 0)

    def act(self, kind: str, position: int) -> None:
        if kind in self.budget:
            self.budget[kind] -= 1
        getattr(self, f"_{kind}")(position)
        for worker in (self.prefill, self.decode):
            worker.poison_free()
            worker.check()

    # Workers -----------------------------------------------------------------------------------

    def _deliver(self, worker: SimWorker, message: Message) -> None:
        kind, what = message
        if kind == "add":
            before = worker.scheduler.num_sequences
            worker.scheduler.add(what, self.now)
            # The first start of the prefill worker gets every attempt in order, and repeats.
            stale = worker is self.prefill and what.attempt <= self.newest
            assert not stale or worker.scheduler.num_sequences == before, "a stale attempt runs"
            if worker is self.prefill:
                self.newest = max(self.newest, what.attempt)
        elif kind == "abort":
            worker.scheduler.abort(what)
        elif kind == "offer":
            worker.scheduler.offer(what, self.now)
            self._report(worker, worker.step(self.now))
        elif kind == "renew":
            worker.scheduler.renew(what, self.now)
        else:
            worker.scheduler.release(what)

    def _report(self, worker: SimWorker, update: Any) -> None:
        channel = self.from_prefill if worker is self.prefill else self.from_decode
        channel += [*update.deltas, *update.sealed, *update.handoffs]

    def _to_prefill(self, position: int) -> None:
        self._deliver(self.prefill, self.to_prefill.pop(0))
        self._report(self.prefill, self.prefill.settle())

    def _to_decode(self, position: int) -> None:
        self._deliver(self.decode, self.to_decode.pop(0))
        self._report(self.decode, self.decode.settle())

    def _step_prefill(self, position: int) -> None:
        self._report(self.prefill, self.prefill.step(self.now))

    def _step_decode(self, position: int) -> None:
        self._report(self.decode, self.decode.step(self.now))

    def _copied(self, position: int) -> None:
        self._report(self.prefill, self.prefill.finish_export(position, self.now))

    def _copy_fails(self, position: int) -> None:
        update = self.prefill.finish_export(position, self.now, ok=False)
        self._report(self.prefill, update)

    def _fetched(self, position: int) -> None:
        update = self.decode.finish_import(position, self.prefill, self.now)
        self._report(self.decode, update)

    def _rot(self, position: int) -> None:
        frame = self.prefill.store.frames[position]
        spoilt = [(t ^ 1, p, c) for t, p, c in frame.slots]
        self.prefill.store.frames[position] = Frame(frame.key, spoilt)

    def _tick(self, position: int) -> None:
        """A third of a lease passes; the gateway renews, which may arrive late."""
        self.now += 1.0
        if self.grants and not self.client.ended:
            self.to_prefill.append(("renew", tuple(self.grants)))
        self._report(self.prefill, self.prefill.step(self.now))

    # The gateway -------------------------------------------------------------------------------

    def _from_prefill(self, position: int) -> None:
        self._receive(self.from_prefill.pop(0))

    def _from_decode(self, position: int) -> None:
        self._receive(self.from_decode.pop(0))

    def _receive(self, message: TokenDelta | Handoff | Sealed) -> None:
        client = self.client
        if isinstance(message, TokenDelta):
            if not client.ended:
                client.take(message)
        elif client.ended or message.attempt != client.request.attempt:
            self.to_prefill.append(("release", (message.grant.grant_id,)))  # nobody needs it
        elif isinstance(message, Sealed):
            self.grants.append(message.grant.grant_id)
            self.to_decode.append(("offer", message))
        else:
            if message.grant.grant_id not in self.grants:
                self.grants.append(message.grant.grant_id)
            client.take_handoff(message)
            self._place(hand_off=False, handoff=message)
        self._release_if_ended()

    def _place(self, **changes: Any) -> None:
        request: Request = self.client.next_leg(**changes)
        self.on_decode = not request.hand_off
        channel = self.to_decode if self.on_decode else self.to_prefill
        channel.append(("add", request))

    def _release_if_ended(self) -> None:
        if self.client.ended and self.grants:
            self.to_prefill.append(("release", tuple(self.grants)))
            self.grants = []

    def _abort(self, position: int) -> None:
        self.client.aborted = True
        channel = self.to_decode if self.on_decode else self.to_prefill
        channel.append(("abort", self.client.id))
        self._release_if_ended()

    def _give_up(self, position: int) -> None:
        """A worker seems frozen: the request goes to the decode worker under a new attempt."""
        channel = self.to_decode if self.on_decode else self.to_prefill
        channel.append(("abort", self.client.id))
        self._place(hand_off=False, attempt=self.client.request.attempt + 1)

    def _repeat(self, position: int) -> None:
        """A stream that was cut and resumed brings the first placement once more."""
        self.to_prefill.append(("add", self.first))

    def _crash_prefill(self, position: int) -> None:
        self.prefill = SimWorker(CONFIG, "prefill", self.prefill.leases.epoch + 1)
        self.to_prefill, self.from_prefill = [], []
        self.newest = -1
        self.grants = []
        if not self.client.ended and not self.on_decode:
            self._place(attempt=self.client.request.attempt + 1, hand_off=True)

    def _crash_decode(self, position: int) -> None:
        self.decode = SimWorker(CONFIG, "decode", self.decode.leases.epoch + 1)
        self.to_decode, self.from_decode = [], []
        if not self.client.ended and self.on_decode:
            self._place(attempt=self.client.request.attempt + 1, hand_off=False)

    # What must hold ----------------------------------------------------------------------------

    def check_end(self, *, failed: bool, disturbed: bool) -> None:
        """Nothing moves any more: the request has ended once, and nothing is left behind."""
        assert self.client.ended, "the request never ended"
        assert self.client.finish is not FinishReason.ERROR or failed, "an error without a reason"
        for worker in (self.prefill, self.decode):
            worker.check_empty()
            assert disturbed or not worker.num_fallbacks(), "a fallback without a reason"

    def key(self) -> Hashable:
        """Equal for states from which the same can happen."""
        client = self.client
        return (
            tuple(sorted(self.budget.items())),
            tuple(map(_message_key, self.to_prefill)),
            tuple(map(_message_key, self.from_prefill)),
            tuple(map(_message_key, self.to_decode)),
            tuple(map(_message_key, self.from_decode)),
            (client.id, client.aborted, client.finish, client.leg_ended, self.on_decode),
            tuple(client.received),
            tuple(self.grants),
            self.newest,
            _worker_key(self.prefill, self.now),
            _worker_key(self.decode, self.now),
        )


def _message_key(message: Any) -> Hashable:
    if isinstance(message, TokenDelta):
        return (message.attempt, message.first_index, message.token_ids, message.finish)
    if isinstance(message, Sealed):
        return ("sealed", message.attempt, message.grant.grant_id, message.grant.epoch)
    if isinstance(message, Handoff):
        return (message.attempt, message.grant.grant_id, message.grant.epoch, message.digests)
    kind, what = message
    if isinstance(what, Sealed):
        return (kind, _message_key(what))
    if isinstance(what, Request):
        handoff = what.handoff and _message_key(what.handoff)
        return (kind, what.attempt, what.emitted, what.hand_off, handoff)
    return (kind, what)


def _worker_key(worker: SimWorker, now: float) -> Hashable:
    scheduler, index, leases = worker.scheduler, worker.index, worker.leases
    pool, exports = scheduler.pool, scheduler.exports
    return (
        leases.epoch,
        tuple(pool._refs),
        tuple(pool._key_of),
        tuple(pool._empty),
        tuple(pool._cached),
        tuple(map(tuple, worker.kv.blocks)),
        tuple((frame.key, tuple(frame.slots)) for frame in worker.store.frames),
        tuple(order.key for order in worker.exports),
        tuple(
            (o.seq_id, o.grant and o.grant.epoch, tuple(w.block for w in o.wanted))
            for o in worker.imports
        ),
        tuple(
            (
                seq.id,
                seq.status,
                tuple(seq.token_ids),
                seq.num_computed,
                tuple(seq.blocks),
                seq.request.hand_off,
                seq.request.handoff is None,
            )
            for seq in scheduler.books.sequences.values()
        ),
        tuple(seq.id for seq in scheduler.books.waiting),
        tuple(scheduler.books.running),
        tuple(scheduler.books.attempts._latest.values()),
        tuple(
            (seq_id, e.credits, e.state, e.grant, tuple((p.key, p.digest) for p in e.parts))
            for seq_id, e in exports._exports.items()
        ),
        tuple(exports._waiting),
        tuple((k, s.frame, s.state, s.num_holds, s.digest) for k, s in index._slots.items()),
        tuple(index._free),
        tuple(index._cached),
        tuple((g, lease.deadline - now, tuple(lease.keys)) for g, lease in leases._leases.items()),
    )

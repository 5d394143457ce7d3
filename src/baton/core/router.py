"""Which workers take a request.

First version: the least predicted work. A prefill worker's work is the prompt tokens that it was
given and has not finished, less what its prefix cache is believed to hold; a decode worker's is
the tokens of context that it keeps. All figures are the router's own books, so that a placement
depends on nothing but the calls made here, and replays.

Where another worker's store is believed to hold more of the prompt's beginning than the one that
will compute it has, it is named as the lender, if fetching is predicted to take less time than
computing. Both are what workers told of finished requests (of fetches, see `fetch_time`); until
there are some, fetching is taken to be the cheaper. From such rates, too, come the seconds that are
predicted of a placement (see `candidate`); those decide nothing.

Keys are those of one class of workers. A worker of another class has other keys for the same
prompt, so nothing is believed of what it holds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from baton.core.candidate import Candidate, times
from baton.core.fetch_time import FetchTime
from baton.core.predicted import Predicted
from baton.errors import Unavailable
from baton.types import Role, StageTimes

DECODE_WEIGHT = 16
"""Prompt tokens' worth of waiting that one running answer means on a unified worker."""


RATE_WEIGHT = 0.2
"""Of the newest figure in a moving average."""


class WorkerInfo(msgspec.Struct, frozen=True):
    """What the router must know of a worker. `num_blocks` bounds what it can have cached.

    Workers of one `key_class` have the same keys for the same tokens.
    """

    worker_id: str
    role: Role
    epoch: int
    num_blocks: int
    block_size: int
    num_frames: int = 0
    keeps_blocks: bool = False
    key_class: str = ""


class Placement(msgspec.Struct, frozen=True):
    """Where a request goes. Without `prefill`, the `decode` worker computes the prompt too.

    `predicted_tokens` is the work ahead of the first token, this prompt included. `lender` is
    whose store is worth asking for the prompt's blocks from `first_lent` on. `predicted` is what
    was expected of it.
    """

    decode: str
    prefill: str | None
    predicted_tokens: int
    lender: str | None = None
    first_lent: int = 0
    predicted: Predicted = Predicted()


class Pair(NamedTuple):
    """Who computes the prompt, and who the answer; None if it is the same worker."""

    prefill: str | None
    decode: str


class _Worker:
    __slots__ = (
        "context_tokens",
        "decode_token_s",
        "fetch_time",
        "info",
        "known",
        "num_requests",
        "prefill_token_s",
        "prefill_tokens",
        "stored",
        "take_block_s",
    )

    def __init__(self, info: WorkerInfo) -> None:
        self.info = info
        self.prefill_tokens = 0
        self.context_tokens = 0
        self.num_requests = 0
        self.known: OrderedDict[bytes, None] = OrderedDict()
        self.stored: OrderedDict[bytes, None] = OrderedDict()
        # None: not known yet. A block that is taken over had the time to come early.
        self.prefill_token_s: float | None = None
        self.fetch_time = FetchTime()
        self.take_block_s: float | None = None
        self.decode_token_s: float | None = None

    def uncached(self, num_tokens: int, keys: Sequence[bytes]) -> int:
        if not keys or keys[0] not in self.known:
            return num_tokens
        num_hits = _num_leading(keys, self.known)
        # The last token is always computed.
        return max(1, num_tokens - num_hits * self.info.block_size)

    def remember(self, keys: Sequence[bytes]) -> None:
        """These blocks are in its KV cache."""
        _remember(self.known, keys, self.info.num_blocks)

    def store(self, keys: Sequence[bytes]) -> None:
        """These blocks are in its store."""
        _remember(self.stored, keys, self.info.num_frames)

    def num_had(self, keys: Sequence[bytes]) -> int:
        """Leading blocks that it need not compute."""
        return _num_leading(keys, self.known, self.stored)


class _Placed(msgspec.Struct):
    prefill: _Worker
    decode: _Worker
    prefill_tokens: int
    context_tokens: int
    transfer_blocks: int


class _Keys(NamedTuple):
    """A prompt's keys, and at which workers they are its keys."""

    keys: Sequence[bytes]
    key_class: str

    def at(self, worker: _Worker) -> Sequence[bytes]:
        return self.keys if worker.info.key_class == self.key_class else ()


class Router:
    """Placements over the workers that have joined. Pure; owned by the gateway's loop.

    pinned: choices of requests that go where they are told, as long as these workers are there.
    Everything else is decided and booked as ever: so history is repeated, up to another turn.
    """

    def __init__(self, pinned: Mapping[tuple[str, int], Pair] | None = None) -> None:
        self._workers: dict[str, _Worker] = {}
        self._by_role: dict[Role, dict[str, _Worker]] = {role: {} for role in Role}
        self._placed: dict[tuple[str, int], _Placed] = {}
        self._pinned = pinned or {}

    def join(self, info: WorkerInfo) -> None:
        """A worker can take requests. One that was known starts anew, with an empty cache."""
        for workers in self._by_role.values():
            workers.pop(info.worker_id, None)
        worker = self._workers[info.worker_id] = _Worker(info)
        self._by_role[info.role][info.worker_id] = worker

    def leave(self, worker_id: str) -> None:
        """A worker is gone or draining: nothing more is placed on it."""
        worker = self._workers.pop(worker_id, None)
        if worker is not None:
            del self._by_role[worker.info.role][worker_id]

    def roles(self) -> set[Role]:
        """The roles that somebody plays."""
        return {role for role, workers in self._by_role.items() if workers}

    def place(
        self,
        request_id: str,
        choice: int,
        num_tokens: int,
        keys: Sequence[bytes],
        key_class: str = "",
        now: float = 0.0,
    ) -> Placement:
        """Choose workers for a prompt of `num_tokens` whose full blocks have these `keys`, at
        workers of `key_class`. Nothing depends on `now`, which is for logs.

        Raises:
            Unavailable: no unified worker, and not both a prefill and a decode worker.
        """
        self._forget(request_id, choice)  # an earlier attempt
        wanted = _Keys(keys, key_class)
        pinned = self._pinned.get((request_id, choice))
        first, second = self._told(pinned) or self._choose(num_tokens, wanted)
        chosen = _candidate(first, second, num_tokens, wanted)
        placed = _Placed(first, second, chosen.prefill_tokens, num_tokens, chosen.transfer_blocks)
        first.prefill_tokens += placed.prefill_tokens
        second.context_tokens += num_tokens
        second.num_requests += 1
        first_lent = first.num_had(wanted.at(first))
        lender = self._lender(first, first_lent, wanted.at(first))
        first.remember(wanted.at(first))
        if first is not second:
            second.remember(wanted.at(second))
            first.store(wanted.at(first))
        self._placed[request_id, choice] = placed
        return Placement(
            decode=chosen.decode,
            prefill=chosen.prefill,
            predicted_tokens=chosen.work,
            lender=lender,
            first_lent=first_lent if lender else 0,
            predicted=chosen.predicted,
        )

    def candidates(
        self, num_tokens: int, keys: Sequence[bytes], key_class: str = ""
    ) -> list[Candidate]:
        """Every way in which such a prompt can be placed now, by name. Changes nothing."""
        wanted = _Keys(keys, key_class)
        by_role = {
            role: [worker for _, worker in sorted(workers.items())]
            for role, workers in self._by_role.items()
        }
        pairs = [(first, first) for first in by_role[Role.UNIFIED]]
        pairs += [(p, d) for p in by_role[Role.PREFILL] for d in by_role[Role.DECODE]]
        pairs += [(alone, alone) for alone in by_role[Role.DECODE]]
        return [_candidate(first, second, num_tokens, wanted) for first, second in pairs]

    def _told(self, pinned: Pair | None) -> tuple[_Worker, _Worker] | None:
        if pinned is None:
            return None
        second = self._workers.get(pinned.decode)
        first = self._workers.get(pinned.prefill or pinned.decode)
        return (first, second) if first and second else None

    def _choose(self, num_tokens: int, wanted: _Keys) -> tuple[_Worker, _Worker]:
        """Who computes the prompt, and who the answer: one unified worker, or one of each kind."""
        prefill = self._least(Role.PREFILL, num_tokens, wanted)
        unified = self._least(Role.UNIFIED, num_tokens, wanted)
        decodes = self._by_role[Role.DECODE].values()
        split = prefill is not None and bool(decodes)
        if not split and unified is None:
            missing = "decode" if prefill else "prefill"
            raise Unavailable(f"no {missing} worker can take the request now", stage="queue")
        if unified and (
            not split
            or not prefill
            or _work(unified, num_tokens, wanted) < _work(prefill, num_tokens, wanted)
        ):
            return unified, unified
        assert prefill is not None
        second = min(decodes, key=lambda w: (w.context_tokens, w.num_requests, w.info.worker_id))
        return prefill, second

    def _lender(self, first: _Worker, num_had: int, keys: Sequence[bytes]) -> str | None:
        """Whose store saves `first` the most blocks, if asking it is worth the time."""
        rest = keys[num_had:]
        best, num_blocks = None, 0
        for worker in self._workers.values():
            if worker is not first and (held := _num_leading(rest, worker.stored)) > num_blocks:
                best, num_blocks = worker, held
        if best is None:
            return None
        compute_s = times(num_blocks * first.info.block_size, first.prefill_token_s)
        is_dearer = first.fetch_time.is_dearer(num_blocks, compute_s)
        return None if is_dearer else best.info.worker_id

    def timed(self, worker_id: str, told: StageTimes) -> None:
        """What a worker told of a leg that has ended, from which its rates are learned."""
        worker = self._workers.get(worker_id)
        if worker is None:
            return
        rate = _learned(worker.prefill_token_s, told.prefill_s, told.num_prompt_computed)
        worker.prefill_token_s = rate
        if told.num_imported_blocks > 0 and told.import_s > 0:
            worker.fetch_time.observe(told.num_imported_blocks, told.import_s)
        rate = _learned(worker.decode_token_s, told.decode_s, told.num_decoded)
        worker.decode_token_s = rate
        placed = self._placed.get((told.request_id, told.choice))
        if placed and placed.decode is worker is not placed.prefill and placed.transfer_blocks:
            # That nobody had to wait, since all had come early, is news as well.
            block_s = told.import_s / placed.transfer_blocks
            worker.take_block_s = _average(worker.take_block_s, block_s)

    def stored(self, worker_id: str) -> list[bytes]:
        """Keys of the blocks that its store is believed to hold, the newest last."""
        worker = self._workers.get(worker_id)
        return [] if worker is None else list(worker.stored)

    def kept(self, worker_id: str, keys: Sequence[bytes]) -> None:
        """A worker has computed the blocks of these keys; if it keeps them, it may lend them."""
        worker = self._workers.get(worker_id)
        if worker is not None and worker.info.keeps_blocks:
            worker.store(keys)

    def prefilled(self, request_id: str, choice: int, now: float = 0.0) -> None:
        """The first token has arrived: the prompt's work is done. `now` as in `place`."""
        placed = self._placed.get((request_id, choice))
        if placed is not None:
            placed.prefill.prefill_tokens -= placed.prefill_tokens
            placed.prefill_tokens = 0

    def finished(self, request_id: str, choice: int, now: float = 0.0) -> None:
        """The request has ended, however it did. Idempotent. `now` as in `place`."""
        self._forget(request_id, choice)

    def _forget(self, request_id: str, choice: int) -> None:
        placed = self._placed.pop((request_id, choice), None)
        if placed is not None:
            placed.prefill.prefill_tokens -= placed.prefill_tokens
            placed.decode.context_tokens -= placed.context_tokens
            placed.decode.num_requests -= 1

    def _least(self, role: Role, num_tokens: int, keys: _Keys) -> _Worker | None:
        best, least = None, (0, 0, "")
        for name, worker in self._by_role[role].items():
            rank = _work(worker, num_tokens, keys), worker.num_requests, name
            if best is None or rank < least:
                best, least = worker, rank
        return best


def _num_leading(keys: Sequence[bytes], *held: Mapping[bytes, None]) -> int:
    """How many keys there are before the first that is in none of `held`."""
    for number, key in enumerate(keys):
        for each in held:
            if key in each:
                break
        else:
            return number
    return len(keys)


def _remember(held: OrderedDict[bytes, None], keys: Sequence[bytes], limit: int) -> None:
    if held.keys().isdisjoint(keys):
        held.update(dict.fromkeys(keys))
    else:
        for key in keys:
            held[key] = None
            held.move_to_end(key)
    while len(held) > limit:
        held.popitem(last=False)


def _learned(before: float | None, seconds: float, count: int) -> float | None:
    """The rate of what took so long; as it was, if there is nothing to learn."""
    return _average(before, seconds / count) if seconds > 0 and count > 0 else before


def _average(before: float | None, newest: float) -> float:
    return newest if before is None else before + RATE_WEIGHT * (newest - before)


def _queue(worker: _Worker) -> int:
    """Work before a new prompt, in prompt tokens."""
    decoding = DECODE_WEIGHT * worker.num_requests if worker.info.role is Role.UNIFIED else 0
    return worker.prefill_tokens + decoding


def _work(worker: _Worker, num_tokens: int, keys: _Keys) -> int:
    """Predicted work ahead of the first token, in prompt tokens."""
    return _queue(worker) + worker.uncached(num_tokens, keys.at(worker))


def _candidate(first: _Worker, second: _Worker, num_tokens: int, keys: _Keys) -> Candidate:
    queue_tokens = _queue(first)
    prefill_tokens = first.uncached(num_tokens, keys.at(first))
    transfer_blocks = 0
    if first is not second:
        num_blocks = -(-num_tokens // second.info.block_size)
        transfer_blocks = num_blocks - _num_leading(keys.at(second), second.known)
    return Candidate(
        prefill=None if first is second else first.info.worker_id,
        decode=second.info.worker_id,
        considered=first.info.role is not Role.DECODE,
        queue_tokens=queue_tokens,
        prefill_tokens=prefill_tokens,
        transfer_blocks=transfer_blocks,
        context_tokens=second.context_tokens,
        num_requests=second.num_requests,
        predicted=Predicted(
            queue_s=times(queue_tokens, first.prefill_token_s),
            prefill_s=times(prefill_tokens, first.prefill_token_s),
            transfer_s=times(transfer_blocks, second.take_block_s),
            decode_step_s=second.decode_token_s,
        ),
    )

"""Which workers take a request.

First version: the least predicted work. A prefill worker's work is the prompt tokens that it was
given and has not finished, less what its prefix cache is believed to hold; a decode worker's is
the tokens of context that it keeps. All figures are the router's own books, so that a placement
depends on nothing but the calls made here, and replays.

Where another worker's store is believed to hold more of the prompt's beginning than the one that
will compute it has, it is named as the lender, if fetching is predicted to take less time than
computing. Both rates are what workers told of finished requests; until there are some, fetching is
taken to be the cheaper.

Keys are those of one class of workers. A worker of another class has other keys for the same
prompt, so nothing is believed of what it holds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

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
    whose store is worth asking for the prompt's blocks from `first_lent` on.
    """

    decode: str
    prefill: str | None
    predicted_tokens: int
    lender: str | None = None
    first_lent: int = 0


class _Worker:
    __slots__ = (
        "context_tokens",
        "fetch_block_s",
        "info",
        "known",
        "num_requests",
        "prefill_token_s",
        "prefill_tokens",
        "stored",
    )

    def __init__(self, info: WorkerInfo) -> None:
        self.info = info
        self.prefill_tokens = 0
        self.context_tokens = 0
        self.num_requests = 0
        self.known: OrderedDict[bytes, None] = OrderedDict()
        self.stored: OrderedDict[bytes, None] = OrderedDict()
        self.prefill_token_s = 0.0  # 0: not known yet
        self.fetch_block_s = 0.0

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


class _Keys(NamedTuple):
    """A prompt's keys, and at which workers they are its keys."""

    keys: Sequence[bytes]
    key_class: str

    def at(self, worker: _Worker) -> Sequence[bytes]:
        return self.keys if worker.info.key_class == self.key_class else ()


class Router:
    """Placements over the workers that have joined. Pure; owned by the gateway's loop."""

    def __init__(self) -> None:
        self._workers: dict[str, _Worker] = {}
        self._placed: dict[tuple[str, int], _Placed] = {}

    def join(self, info: WorkerInfo) -> None:
        """A worker can take requests. One that was known starts anew, with an empty cache."""
        self._workers[info.worker_id] = _Worker(info)

    def leave(self, worker_id: str) -> None:
        """A worker is gone or draining: nothing more is placed on it."""
        self._workers.pop(worker_id, None)

    def roles(self) -> set[Role]:
        """The roles that somebody plays."""
        return {worker.info.role for worker in self._workers.values()}

    def place(
        self,
        request_id: str,
        choice: int,
        num_tokens: int,
        keys: Sequence[bytes],
        key_class: str = "",
    ) -> Placement:
        """Choose workers for a prompt of `num_tokens` whose full blocks have these `keys`, at
        workers of `key_class`.

        Raises:
            Unavailable: no unified worker, and not both a prefill and a decode worker.
        """
        self._forget(request_id, choice)  # an earlier attempt
        wanted = _Keys(keys, key_class)
        prefill = self._least(Role.PREFILL, num_tokens, wanted)
        unified = self._least(Role.UNIFIED, num_tokens, wanted)
        decodes = [w for w in self._workers.values() if w.info.role is Role.DECODE]
        split = prefill is not None and bool(decodes)
        if not split and unified is None:
            missing = "decode" if prefill else "prefill"
            raise Unavailable(f"no {missing} worker can take the request now", stage="queue")
        if unified and (
            not split
            or not prefill
            or _work(unified, num_tokens, wanted) < _work(prefill, num_tokens, wanted)
        ):
            first = second = unified
        else:
            assert prefill is not None
            first = prefill
            second = min(
                decodes, key=lambda w: (w.context_tokens, w.num_requests, w.info.worker_id)
            )
        predicted = _work(first, num_tokens, wanted)
        placed = _Placed(first, second, first.uncached(num_tokens, wanted.at(first)), num_tokens)
        first.prefill_tokens += placed.prefill_tokens
        second.context_tokens += num_tokens
        second.num_requests += 1
        first_lent = first.num_had(wanted.at(first))
        lender = self._lender(first, first_lent, wanted.at(first))
        first.remember(wanted.at(first))
        second.remember(wanted.at(second))
        if first is not second:
            first.store(wanted.at(first))
        self._placed[request_id, choice] = placed
        return Placement(
            decode=second.info.worker_id,
            prefill=None if first is second else first.info.worker_id,
            predicted_tokens=predicted,
            lender=lender,
            first_lent=first_lent if lender else 0,
        )

    def _lender(self, first: _Worker, num_had: int, keys: Sequence[bytes]) -> str | None:
        """Whose store saves `first` the most blocks, if asking it is worth the time."""
        rest = keys[num_had:]
        best, num_blocks = None, 0
        for worker in self._workers.values():
            if worker is not first and (held := _num_leading(rest, worker.stored)) > num_blocks:
                best, num_blocks = worker, held
        if best is None:
            return None
        compute_s = num_blocks * first.info.block_size * first.prefill_token_s
        fetch_s = num_blocks * first.fetch_block_s
        known = first.prefill_token_s and first.fetch_block_s
        return None if known and fetch_s > compute_s else best.info.worker_id

    def timed(self, worker_id: str, times: StageTimes) -> None:
        """What a worker told of a leg that has ended, from which its rates are learned."""
        worker = self._workers.get(worker_id)
        if worker is None:
            return
        if times.num_prompt_computed > 0 and times.prefill_s > 0:
            token_s = times.prefill_s / times.num_prompt_computed
            worker.prefill_token_s = _average(worker.prefill_token_s, token_s)
        if times.num_imported_blocks > 0 and times.import_s > 0:
            block_s = times.import_s / times.num_imported_blocks
            worker.fetch_block_s = _average(worker.fetch_block_s, block_s)

    def stored(self, worker_id: str) -> list[bytes]:
        """Keys of the blocks that its store is believed to hold, the newest last."""
        worker = self._workers.get(worker_id)
        return [] if worker is None else list(worker.stored)

    def kept(self, worker_id: str, keys: Sequence[bytes]) -> None:
        """A worker has computed the blocks of these keys; if it keeps them, it may lend them."""
        worker = self._workers.get(worker_id)
        if worker is not None and worker.info.keeps_blocks:
            worker.store(keys)

    def prefilled(self, request_id: str, choice: int) -> None:
        """The first token has arrived: the prompt's work is done."""
        placed = self._placed.get((request_id, choice))
        if placed is not None:
            placed.prefill.prefill_tokens -= placed.prefill_tokens
            placed.prefill_tokens = 0

    def finished(self, request_id: str, choice: int) -> None:
        """The request has ended, however it did. Idempotent."""
        self._forget(request_id, choice)

    def _forget(self, request_id: str, choice: int) -> None:
        placed = self._placed.pop((request_id, choice), None)
        if placed is not None:
            placed.prefill.prefill_tokens -= placed.prefill_tokens
            placed.decode.context_tokens -= placed.context_tokens
            placed.decode.num_requests -= 1

    def _least(self, role: Role, num_tokens: int, keys: _Keys) -> _Worker | None:
        return min(
            (worker for worker in self._workers.values() if worker.info.role is role),
            key=lambda w: (_work(w, num_tokens, keys), w.num_requests, w.info.worker_id),
            default=None,
        )


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
    for key in keys:
        if key in held:
            held.move_to_end(key)
        else:
            held[key] = None
    while len(held) > limit:
        held.popitem(last=False)


def _average(before: float, newest: float) -> float:
    return newest if not before else before + RATE_WEIGHT * (newest - before)


def _work(worker: _Worker, num_tokens: int, keys: _Keys) -> int:
    """Predicted work ahead of the first token, in prompt tokens."""
    decoding = DECODE_WEIGHT * worker.num_requests if worker.info.role is Role.UNIFIED else 0
    return worker.prefill_tokens + worker.uncached(num_tokens, keys.at(worker)) + decoding

"""The decision log: what core was told, and a hash of what it decided.

A log is a sequence of records, each a 4-byte little-endian length and a msgpack body. The first
is a header; the others are inputs in the order of the calls. Decisions are not in it: of each
plan and placement only an 8-byte hash, so `replay` must come to them by itself. `now` is seconds of
the process's monotonic clock; the router needs none, and gets it for who reads the log.

`LoggedScheduler` and `LoggedRouter` are the real ones with a pen in hand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import msgspec

from baton.core.lease import LeaseTable
from baton.core.limits import SchedulerConfig
from baton.core.plan import StepOutput, StepPlan
from baton.core.router import Placement, Router, WorkerInfo
from baton.core.scheduler import Scheduler
from baton.core.sequence import SequenceId
from baton.core.store_index import StoreIndex
from baton.errors import BatonError
from baton.types import Lend, Request, Sealed, StageTimes

VERSION = 5
MAX_RECORD_BYTES = 64 << 20

Sink = Callable[[bytes], object]

_DAMAGE = (msgspec.DecodeError, UnicodeDecodeError)  # text that is not UTF-8 is the latter


class BadLog(BatonError):
    """The bytes are not a decision log of this version."""


class WorkerHeader(msgspec.Struct, frozen=True, tag="worker"):
    version: int
    worker_id: str
    epoch: int
    config: SchedulerConfig


class RouterHeader(msgspec.Struct, frozen=True, tag="router"):
    version: int
    gateway_id: str


class Added(msgspec.Struct, frozen=True, tag="a", array_like=True):
    request: Request
    now: float


class Aborted(msgspec.Struct, frozen=True, tag="b", array_like=True):
    seq_id: SequenceId


class Allowed(msgspec.Struct, frozen=True, tag="c", array_like=True):
    seq_id: SequenceId


class Drained(msgspec.Struct, frozen=True, tag="d", array_like=True):
    pass


class Exported(msgspec.Struct, frozen=True, tag="e", array_like=True):
    key: bytes
    digest: bytes | None
    now: float


class Imported(msgspec.Struct, frozen=True, tag="i", array_like=True):
    number: int
    results: tuple[str, ...]
    now: float
    elapsed_s: float


class Linked(msgspec.Struct, frozen=True, tag="w", array_like=True):
    source: str


class Offered(msgspec.Struct, frozen=True, tag="o", array_like=True):
    sealed: Sealed
    now: float


class Lent(msgspec.Struct, frozen=True, tag="t", array_like=True):
    ask: Lend
    now: float


class Renewed(msgspec.Struct, frozen=True, tag="n", array_like=True):
    grant_ids: tuple[str, ...]
    now: float


class Released(msgspec.Struct, frozen=True, tag="r", array_like=True):
    grant_ids: tuple[str, ...]


class Scheduled(msgspec.Struct, frozen=True, tag="s", array_like=True):
    now: float
    decision: bytes


class Updated(msgspec.Struct, frozen=True, tag="u", array_like=True):
    step: int
    token_ids: list[list[int]]
    elapsed_s: float
    now: float


class Joined(msgspec.Struct, frozen=True, tag="j", array_like=True):
    info: WorkerInfo


class Left(msgspec.Struct, frozen=True, tag="l", array_like=True):
    worker_id: str


class Placed(msgspec.Struct, frozen=True, tag="p", array_like=True):
    request_id: str
    choice: int
    num_tokens: int
    keys: tuple[bytes, ...]
    key_class: str
    now: float
    decision: bytes


class Timed(msgspec.Struct, frozen=True, tag="m", array_like=True):
    worker_id: str
    times: StageTimes


class Kept(msgspec.Struct, frozen=True, tag="k", array_like=True):
    worker_id: str
    keys: tuple[bytes, ...]


class Prefilled(msgspec.Struct, frozen=True, tag="q", array_like=True):
    request_id: str
    choice: int
    now: float


class Finished(msgspec.Struct, frozen=True, tag="f", array_like=True):
    request_id: str
    choice: int
    now: float


Header = WorkerHeader | RouterHeader
SchedulerRecord = (
    Added
    | Aborted
    | Allowed
    | Drained
    | Exported
    | Imported
    | Linked
    | Offered
    | Lent
    | Renewed
    | Released
    | Scheduled
    | Updated
)
RouterRecord = Joined | Left | Placed | Timed | Kept | Prefilled | Finished
Record = SchedulerRecord | RouterRecord

_encoder = msgspec.msgpack.Encoder()
_headers: msgspec.msgpack.Decoder[Header] = msgspec.msgpack.Decoder(Header)
_records: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Record)


def frame(record: msgspec.Struct) -> bytes:
    """One record as it stands in a log."""
    body = _encoder.encode(record)
    return len(body).to_bytes(4, "little") + body


def read(data: bytes) -> tuple[Header, Iterator[Record]]:
    """The header and the records of a log. A record cut off at the end is left out.

    Raises:
        BadLog: not a log, of another version, or damaged in the middle.
    """
    bodies = _bodies(data)
    try:
        header = _headers.decode(next(bodies, b""))
    except _DAMAGE as error:
        raise BadLog(f"this is not a decision log: {error}") from error
    if header.version != VERSION:
        raise BadLog(f"the log has version {header.version}, this Baton reads {VERSION}")
    return header, _decode(bodies)


def _bodies(data: bytes) -> Iterator[bytes]:
    at = 0
    while at + 4 <= len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        if size > MAX_RECORD_BYTES:
            raise BadLog(f"a record of {size} bytes at {at}: the log is damaged")
        if at + 4 + size > len(data):
            return
        yield data[at + 4 : at + 4 + size]
        at += 4 + size


def _decode(bodies: Iterator[bytes]) -> Iterator[Record]:
    for body in bodies:
        try:
            yield _records.decode(body)
        except _DAMAGE as error:
            raise BadLog(f"the log is damaged: {error}") from error


def plan_hash(plan: StepPlan) -> bytes:
    """8 bytes over everything that a plan decides: who runs, how far, in which blocks."""
    size = plan.chunks[0].seq.block_size if plan.chunks else 1
    decided = (
        plan.step,
        [
            (
                chunk.seq.id,
                chunk.start,
                chunk.num_tokens,
                chunk.samples,
                chunk.seq.blocks[
                    chunk.start // size : -(-(chunk.start + chunk.num_tokens) // size)
                ],
            )
            for chunk in plan.chunks
        ],
        [
            (
                order.number,
                order.codec,
                [(want.index, want.block, want.key) for want in order.wanted],
                [(block.key, block.pieces) for block in order.recut.blocks] if order.recut else [],
            )
            for order in plan.imports
        ],
    )
    return _hash(decided)


def placement_hash(placement: Placement | None) -> bytes:
    """8 bytes over a placement; None is a refusal."""
    return _hash(placement)


def _hash(decided: object) -> bytes:
    return hashlib.blake2b(_encoder.encode(decided), digest_size=8).digest()


class LoggedScheduler(Scheduler):
    """A scheduler that writes down its inputs and the hash of every plan."""

    def __init__(
        self, config: SchedulerConfig, leases: LeaseTable, index: StoreIndex, sink: Sink
    ) -> None:
        super().__init__(config, leases, index)
        self._sink = sink
        self._write(WorkerHeader(VERSION, leases.source, leases.epoch, config))

    def _write(self, record: msgspec.Struct) -> None:
        self._sink(frame(record))

    def add(self, request: Request, now: float) -> None:
        self._write(Added(request, now))
        super().add(request, now)

    def abort(self, seq_id: SequenceId) -> None:
        self._write(Aborted(seq_id))
        super().abort(seq_id)

    def proceed(self, seq_id: SequenceId) -> None:
        self._write(Allowed(seq_id))
        super().proceed(seq_id)

    def drain(self) -> None:
        self._write(Drained())
        super().drain()

    def exported(self, key: bytes, digest: bytes | None, now: float) -> None:
        self._write(Exported(key, digest, now))
        super().exported(key, digest, now)

    def imported(
        self, number: int, results: tuple[str, ...], now: float, elapsed_s: float = 0.0
    ) -> None:
        self._write(Imported(number, results, now, elapsed_s))
        super().imported(number, results, now, elapsed_s)

    def link(self, source: str) -> None:
        self._write(Linked(source))
        super().link(source)

    def offer(self, sealed: Sealed, now: float) -> None:
        self._write(Offered(sealed, now))
        super().offer(sealed, now)

    def lend(self, ask: Lend, now: float) -> None:
        self._write(Lent(ask, now))
        super().lend(ask, now)

    def renew(self, grant_ids: tuple[str, ...], now: float) -> None:
        self._write(Renewed(grant_ids, now))
        super().renew(grant_ids, now)

    def release(self, grant_ids: tuple[str, ...]) -> None:
        self._write(Released(grant_ids))
        super().release(grant_ids)

    def steady_steps(self, plan: StepPlan) -> int:
        """Every step is written down, so none may be jumped over."""
        return 1

    def schedule(self, now: float) -> StepPlan:
        plan = super().schedule(now)
        self._write(Scheduled(now, plan_hash(plan)))
        return plan

    def update(self, plan: StepPlan, output: StepOutput, now: float) -> None:
        self._write(Updated(plan.step, output.token_ids, output.elapsed_s, now))
        super().update(plan, output, now)


class LoggedRouter(Router):
    """A router that writes down its inputs and the hash of every placement."""

    def __init__(self, gateway_id: str, sink: Sink) -> None:
        super().__init__()
        self._sink = sink
        self._write(RouterHeader(VERSION, gateway_id))

    def _write(self, record: msgspec.Struct) -> None:
        self._sink(frame(record))

    def join(self, info: WorkerInfo) -> None:
        self._write(Joined(info))
        super().join(info)

    def leave(self, worker_id: str) -> None:
        self._write(Left(worker_id))
        super().leave(worker_id)

    def place(
        self,
        request_id: str,
        choice: int,
        num_tokens: int,
        keys: Sequence[bytes],
        key_class: str = "",
        now: float = 0.0,
    ) -> Placement:
        placement: Placement | None = None
        try:
            placement = super().place(request_id, choice, num_tokens, keys, key_class, now)
            return placement
        finally:
            decision = placement_hash(placement)
            asked = (request_id, choice, num_tokens, tuple(keys), key_class, now)
            self._write(Placed(*asked, decision))

    def timed(self, worker_id: str, times: StageTimes) -> None:
        self._write(Timed(worker_id, times))
        super().timed(worker_id, times)

    def kept(self, worker_id: str, keys: Sequence[bytes]) -> None:
        self._write(Kept(worker_id, tuple(keys)))
        super().kept(worker_id, keys)

    def prefilled(self, request_id: str, choice: int, now: float = 0.0) -> None:
        self._write(Prefilled(request_id, choice, now))
        super().prefilled(request_id, choice, now)

    def finished(self, request_id: str, choice: int, now: float = 0.0) -> None:
        self._write(Finished(request_id, choice, now))
        super().finished(request_id, choice, now)

"""What gateways and workers say to each other, and its binary form.

One bidirectional stream joins a gateway with a worker. The gateway opens it and speaks first:

    gateway → worker   Open, then Instructions …      (one a loop turn, only when there is news)
    worker  → gateway  Hello, then StepReport …       (one a step, and one when load changes)
                       Goodbye                        (when the worker stops)

Reports are numbered from 1, and so are Instructions; each side acknowledges the last one that it
has acted upon. A stream that breaks may be resumed within moments by the same gateway epoch: both
sides then repeat what the other has not acted upon. Any other `Open` starts from 1: the gateway
has forgotten its requests, so the worker aborts them.

Workers find gateways, not the other way round: a worker calls `Announce` on every configured
gateway until it succeeds, and the gateway then opens the stream.

Everything is msgpack with a fixed schema; a message over `MAX_MESSAGE_BYTES`, of an unknown kind
or nested too deep is refused as `MalformedMessage` and never reaches the policy code.
"""

from __future__ import annotations

from typing import Final, TypeVar

import msgspec

from baton.core.step_cost import MeasuredStep
from baton.errors import BatonError, WireError
from baton.types import (
    Alone,
    Handoff,
    KvFormat,
    Landed,
    Lend,
    Pulse,
    Request,
    Role,
    Sealed,
    StageTimes,
    TokenDelta,
    WorkerLoad,
)

T = TypeVar("T")

PROTOCOL_VERSION: Final = 4
MAX_MESSAGE_BYTES: Final = 64 << 20


class MalformedMessage(BatonError):
    """Bytes from a peer that are not a message of this protocol."""


class Announce(msgspec.Struct, frozen=True, tag=True):
    """worker → gateway, unary: "I am here"."""

    worker_id: str
    address: str
    role: Role
    epoch: int
    protocol: int = PROTOCOL_VERSION


class AnnounceReply(msgspec.Struct, frozen=True, tag=True):
    accepted: bool
    reason: str = ""


class Open(msgspec.Struct, frozen=True, tag=True):
    """gateway → worker, first on the stream. `last_index` is the last report acted upon.

    With `resume` the worker goes on where the broken stream ended, or refuses; without it, it
    aborts what it still has of this gateway.
    """

    gateway_id: str
    gateway_epoch: int
    last_index: int = 0
    protocol: int = PROTOCOL_VERSION
    resume: bool = False


class Hello(msgspec.Struct, frozen=True, tag=True):
    """worker → gateway, first on the stream: who I am and what I can take.

    `fingerprint` (of the weights) and `numerics` (the class of arithmetic) name the root of the
    block keys. `kv_format` and they must match, or be convertible, between the two ends of a
    handoff (`core.unlike`).
    `num_frames` is the size of its store; with `keeps_blocks` it holds what was computed here.
    `fabric_host` and `fabric_port` are where it serves blocks over TCP, if it does, `nixl_port` is
    the port there of its door for NIXL.
    `last_index` (set by the server) is the last Instructions acted upon: not 0 only on a resume.
    """

    worker_id: str
    role: Role
    epoch: int
    model: str
    fingerprint: bytes
    numerics: str
    kv_format: KvFormat
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    vocab_size: int
    device: str
    dtype: str
    protocol: int = PROTOCOL_VERSION
    pid: int = 0
    num_frames: int = 0
    keeps_blocks: bool = False
    fabric_host: str = ""
    fabric_port: int = 0
    nixl_port: int = 0
    last_index: int = 0


class Address(msgspec.Struct, frozen=True):
    """Where a worker, in this start of it, serves its blocks to other hosts; 0 is no port."""

    worker_id: str
    epoch: int
    host: str
    port: int
    nixl_port: int = 0


class Measure(msgspec.Struct, frozen=True):
    """Fetch these blocks, of that format, by every way there is, for the figures alone."""

    number: int
    sealed: Sealed
    kv_format: KvFormat


class Measured(msgspec.Struct, frozen=True):
    """One way's figures: of one block, of many, and CPU seconds of the reader; or what failed."""

    number: int
    transport: str
    problem: str = ""
    latency_s: float = 0.0
    bytes_per_s: float = 0.0
    cpu_s_per_byte: float = 0.0


class Abort(msgspec.Struct, frozen=True):
    request_id: str
    choice: int
    attempt: int


class Instructions(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """gateway → worker: everything that is new since the last message.

    `peers` are the addresses of all workers that have one, when they have changed. `offer` are
    blocks that others have sealed and that this worker may soon want; `lend` asks it to open
    blocks of its own. `measure` asks what fetching costs. `proceed` names suspects, as (request id,
    choice, attempt), that may make steps of their own. `renew` and `release` name grants that
    this worker minted. `ack` is the last report index acted upon. `drain` asks it to finish what
    runs and take nothing new. A worker acts on `offer` before `submit` and on that before
    `abort`, so that all may stand in one message. `index` is set by the link.
    """

    peers: tuple[Address, ...] | None = None
    offer: tuple[Sealed, ...] = ()
    lend: tuple[Lend, ...] = ()
    measure: tuple[Measure, ...] = ()
    submit: tuple[Request, ...] = ()
    abort: tuple[Abort, ...] = ()
    proceed: tuple[tuple[str, int, int], ...] = ()
    renew: tuple[str, ...] = ()
    release: tuple[str, ...] = ()
    drain: bool = False
    ack: int = 0
    index: int = 0


class StepReport(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """worker → gateway: what one step brought for this gateway, and the load after it.

    `sealed` are blocks that this worker opens to readers, `landed` those that it fetched early.
    `alone` are suspects that wait for `Instructions.proceed`, or that others are beside again.
    `counters` are the worker's running totals (tokens computed, hits, preemptions, fallbacks).
    `step` is one that ran since the last report, with its shape and time; not every one is told.
    `pulse` comes every half second, whatever the engine does. `fatal` is the last word of a worker
    that is about to exit, and `suspects` are those, as (request id, choice, attempt), that were in
    the step which failed. `index` and `ack` (the last Instructions acted upon) are set by the
    server.
    """

    index: int
    load: WorkerLoad
    deltas: tuple[TokenDelta, ...] = ()
    sealed: tuple[Sealed, ...] = ()
    landed: tuple[Landed, ...] = ()
    measured: tuple[Measured, ...] = ()
    handoffs: tuple[Handoff, ...] = ()
    times: tuple[StageTimes, ...] = ()
    alone: tuple[Alone, ...] = ()
    counters: dict[str, int] = {}
    step: MeasuredStep | None = None
    draining: bool = False
    pulse: Pulse | None = None
    fatal: WireError | None = None
    suspects: tuple[tuple[str, int, int], ...] = ()
    ack: int = 0


class Goodbye(msgspec.Struct, frozen=True, tag=True):
    """worker → gateway, last on the stream: nothing follows, the gateway may end it.

    It is the gateway that ends the stream of a worker that stops: gRPC may drop reports that are
    still unread when the worker does.
    """


ToWorker = Open | Instructions
ToGateway = Hello | StepReport | Goodbye

_encoder = msgspec.msgpack.Encoder()
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_to_gateway: msgspec.msgpack.Decoder[ToGateway] = msgspec.msgpack.Decoder(ToGateway)
_announce = msgspec.msgpack.Decoder(Announce)
_announce_reply = msgspec.msgpack.Decoder(AnnounceReply)


def encode(message: msgspec.Struct) -> bytes:
    return _encoder.encode(message)


def decode_to_worker(data: bytes) -> ToWorker:
    return _decode(_to_worker, data)


def decode_to_gateway(data: bytes) -> ToGateway:
    return _decode(_to_gateway, data)


def decode_announce(data: bytes) -> Announce:
    return _decode(_announce, data)


def decode_announce_reply(data: bytes) -> AnnounceReply:
    return _decode(_announce_reply, data)


def _decode(decoder: msgspec.msgpack.Decoder[T], data: bytes) -> T:
    if len(data) > MAX_MESSAGE_BYTES:
        raise MalformedMessage(f"message of {len(data)} bytes exceeds {MAX_MESSAGE_BYTES}")
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage(str(error)) from error

"""What `tcp` puts on the wire: three messages, and blocks between two of them.

    reader ── Ask ────────────────────────────────────────────────────────────────► server
           ◄── Blocks, the bytes of every block said to be ok in the order asked, End ──
           ◄── or Refusal, and nothing after it ────────────────────────────────────────

A connection carries any number of asks; a reader may send the next before it has the answer to
the last, and answers come in the order of the asks. Where anything is not as written here, either
end closes the connection: nothing is skipped to find the next message.

A message is its length (4 bytes, big endian, 1 to `MAX_MESSAGE_BYTES`) and as many bytes of
msgpack: an array that begins with the message's name and has exactly the fields below. The length
is checked before memory is taken for it. What there is for each block lies in one piece, so that
an ask for many blocks costs little more than one for few.

    Ask       "ask"
      protocol    int          PROTOCOL_VERSION; another one is refused
      ask_id      16 bytes     random and new; the answer repeats it in each message, so that an
                               answer which is replayed, repeated or out of order is known as such
      kv_format   32 bytes     SHA-256 of the reader's kv_format; an unlike one is refused
      codec       str          how the blocks are to travel; `raw` is as they are stored
      grant       map          `types.Grant`; its MAC covers grant_id, source, tenant and epoch
      keys        32 bytes for each of 1 to 1,024 blocks
      numbers     u32, little endian, one for each block of each kind:
        frame                  hint: the server trusts it only if the frame's header has the key
        num_bytes              the stored length that the reader expects
        num_tokens             how many slots are filled, 0 for all: what an encoder looks at

    Blocks    "blocks"
      ask_id      16 bytes
      results     1 byte for each block asked for, in order: 0 ok, 1 missing, 2 out_of_range,
                  3 wrong_size, 4 refused (not covered by the grant's lease, or that is over)
      num_bytes   int          how many bytes follow, of all blocks that are ok: of each, with
                               `raw`, what was asked for, and with another codec its constant
                               encoded length

    Refusal   "refusal"
      ask_id      16 bytes
      reason      str          refused, stale_epoch, wrong_format, codec (not known to the server)

    End       "end"
      ask_id      16 bytes
      changed     ints         indices of blocks whose frame was written to while it was sent
      corrupt     ints         indices of blocks that are not what was once stored (not with `raw`)
      digests     16 bytes     of each ok block, in order: XXH3-128 of its key and of the XXH3-128
                               of its encoded bytes, or zeros if it is changed or corrupt; none
                               with `raw`, whose digests the reader has from the commit record

The reader's own digest of what it received decides, so a block is good or not whatever else is
said of it; `changed` only tells a frame that was reused from bytes that were damaged. The key is
in an encoded block's, or two could change places in `results` and nobody would see it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Annotated, Final, Literal, Protocol, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash
from msgspec import Meta

from baton.errors import BatonError
from baton.fabric.transport import Bytes, ReadableBlock, ReadResult, WritableBlock
from baton.types import Grant, KvFormat

PROTOCOL_VERSION: Final = 3
RAW: Final = "raw"
MAX_MESSAGE_BYTES: Final = 64 << 10
MAX_BLOCKS: Final = 1024
ASK_ID_BYTES: Final = 16
LENGTH: Final = struct.Struct(">I")

BLOCK_RESULTS: Final = (
    ReadResult.OK,
    ReadResult.MISSING,
    ReadResult.OUT_OF_RANGE,
    ReadResult.WRONG_SIZE,
    ReadResult.REFUSED,
)
"""What is said of a block, by its number."""
MAX_NUMBER: Final = (1 << 32) - 1

_KEY_BYTES: Final = 32
_NUMBERS: Final = 3
_NUMBER_BYTES: Final = 4

Natural = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
AskId = Annotated[bytes, Meta(min_length=ASK_ID_BYTES, max_length=ASK_ID_BYTES)]
Sha256 = Annotated[bytes, Meta(min_length=32, max_length=32)]
Digest = Annotated[bytes, Meta(min_length=16, max_length=16)]
Indices = Annotated[tuple[Natural, ...], Meta(max_length=MAX_BLOCKS)]


class Malformed(BatonError):
    """Bytes from a peer that are not what the protocol has at this place."""


class Ask(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ask"):
    """reader → server."""

    protocol: int
    ask_id: AskId
    kv_format: Sha256
    codec: Annotated[str, Meta(max_length=32)]
    grant: Grant
    keys: Annotated[bytes, Meta(min_length=_KEY_BYTES, max_length=_KEY_BYTES * MAX_BLOCKS)]
    numbers: Annotated[bytes, Meta(max_length=_NUMBERS * _NUMBER_BYTES * MAX_BLOCKS)]

    def each_key(self) -> list[bytes]:
        """The keys, in order."""
        keys = self.keys
        return [keys[at : at + _KEY_BYTES] for at in range(0, len(keys), _KEY_BYTES)]

    def each_number(self) -> npt.NDArray[np.int64]:
        """Frames, stored lengths and filled slots, [3, num_blocks]."""
        return np.frombuffer(self.numbers, "<u4").astype(np.int64).reshape(_NUMBERS, -1)


class Blocks(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="blocks"
):
    """server → reader; the bytes of the blocks that are ok follow, and then `End`.

    results: indices into `BLOCK_RESULTS`.
    """

    ask_id: AskId
    results: Annotated[bytes, Meta(max_length=MAX_BLOCKS)]
    num_bytes: Natural


class Refusal(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="refusal"
):
    """server → reader; nothing follows."""

    ask_id: AskId
    reason: Literal["refused", "stale_epoch", "wrong_format", "codec"]


class End(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="end"):
    """server → reader, after the bytes of the blocks."""

    ask_id: AskId
    changed: Indices = ()
    corrupt: Indices = ()
    digests: Annotated[tuple[Digest, ...], Meta(max_length=MAX_BLOCKS)] = ()


class Codec(Protocol):
    """How blocks travel under another name than `raw`; a block is always encoded to one length."""

    def encoded_bytes(self, fmt: KvFormat) -> int: ...

    def encode(
        self,
        fmt: KvFormat,
        source: ReadableBlock,
        destination: Bytes,
        num_tokens: int | None = None,
    ) -> int:
        """Returns how many bytes it wrote; it looks at `num_tokens` slots, or all."""
        ...

    def decode(self, fmt: KvFormat, source: Bytes, destination: WritableBlock) -> None:
        """Raises ValueError for lengths that do not fit."""
        ...


_encoder = msgspec.msgpack.Encoder()
_ask_decoder = msgspec.msgpack.Decoder(Ask)
_answer_decoder: msgspec.msgpack.Decoder[Blocks | Refusal] = msgspec.msgpack.Decoder(
    Blocks | Refusal
)
_end_decoder = msgspec.msgpack.Decoder(End)

T = TypeVar("T")
Received = bytes | bytearray


def pack(message: Ask | Blocks | Refusal | End) -> bytes:
    """A message with its length before it."""
    data = _encoder.encode(message)
    return LENGTH.pack(len(data)) + data


def decode_length(data: Received) -> int:
    """The length of the message that follows these 4 bytes.

    Raises:
        Malformed: no message has it.
    """
    (length,) = LENGTH.unpack(data)
    if not 1 <= length <= MAX_MESSAGE_BYTES:
        raise Malformed(f"a message of {length} bytes")
    return int(length)


def bound(key: bytes, digest: bytes) -> bytes:
    """What `End` says of an encoded block with this key and this digest."""
    return xxhash.xxh3_128_digest(key + digest)


def pack_numbers(
    frames: Sequence[int], num_bytes: Sequence[int], num_tokens: Sequence[int]
) -> bytes:
    """For an ask: of each block one of each, none over `MAX_NUMBER`."""
    return struct.pack(f"<{_NUMBERS * len(frames)}I", *frames, *num_bytes, *num_tokens)


def decode_ask(data: Received) -> Ask:
    """Raises `Malformed` if it is none."""
    ask = _decode(_ask_decoder, data)
    num_blocks, rest = divmod(len(ask.keys), _KEY_BYTES)
    if rest or len(ask.numbers) != num_blocks * _NUMBERS * _NUMBER_BYTES:
        raise Malformed(f"keys of {len(ask.keys)} bytes, numbers of {len(ask.numbers)}")
    return ask


def decode_answer(data: Received) -> Blocks | Refusal:
    """Raises `Malformed` if it is neither."""
    answer = _decode(_answer_decoder, data)
    if isinstance(answer, Blocks) and max(answer.results, default=0) >= len(BLOCK_RESULTS):
        raise Malformed("a result that no block has")
    return answer


def decode_end(data: Received) -> End:
    """Raises `Malformed` if it is none."""
    return _decode(_end_decoder, data)


def _decode(decoder: msgspec.msgpack.Decoder[T], data: Received) -> T:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(str(error)) from None

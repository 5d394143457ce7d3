"""What crosses the rooms of the house: frozen, typed, cheap to encode.

`Request` travels from gateway to worker, `TokenDelta` and `Handoff` back, `Grant` and the keys
from worker to worker by way of the gateway. Nothing here has behaviour beyond validation.
Durations are seconds, sizes bytes, counts tokens unless the name says otherwise.
"""

from __future__ import annotations

import enum
import math

import msgspec

from baton.errors import InvalidRequest, WireError

MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKEN_IDS = 128
SEED_MASK = (1 << 64) - 1


class Role(enum.StrEnum):
    """A routing label. Every worker can do everything; see DESIGN rule 3."""

    PREFILL = "prefill"
    DECODE = "decode"
    UNIFIED = "unified"


class FinishReason(enum.StrEnum):
    STOP = "stop"  # a stop token (or, at the gateway, a stop string)
    LENGTH = "length"  # max_tokens or the model's length
    ABORT = "abort"
    ERROR = "error"


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How to draw the next token; token ids only, the engine knows no text.

    temperature 0 is greedy. top_k 0 and min_p 0 are off. `logprobs` is None (none) or the number
    of alternatives to return beside the chosen token (0 = only the chosen one). `stop_token_ids`
    already holds the model's end-of-sequence ids unless the client asked to ignore them.
    `seed` is always set: the gateway mints one when the client gave none.
    """

    max_tokens: int
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()

    @property
    def reads_output(self) -> bool:
        """Whether a draw depends on the tokens drawn before it, or on how many they are."""
        return (
            self.min_tokens > 0
            or self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    def validate(self, vocab_size: int) -> None:
        """Check every bound. Runs at the gateway and again at the worker.

        Raises:
            InvalidRequest: `param` names the first field out of bounds.
        """
        for name, low, high in _BOUNDS:
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise InvalidRequest(
                    f"{name} must be between {low} and {high}, not {value}", param=name
                )
        if self.top_p <= 0:
            raise InvalidRequest("top_p must be greater than 0", param="top_p")
        if self.repetition_penalty <= 0:
            raise InvalidRequest(
                "repetition_penalty must be greater than 0", param="repetition_penalty"
            )
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_TOP_LOGPROBS:
            raise InvalidRequest(
                f"logprobs must be between 0 and {MAX_TOP_LOGPROBS}, not {self.logprobs}",
                param="logprobs",
            )
        if self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens ({self.min_tokens}) exceeds max_tokens ({self.max_tokens})",
                param="min_tokens",
            )
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest(
                f"logit_bias has more than {MAX_LOGIT_BIAS} entries", param="logit_bias"
            )
        for token, bias in self.logit_bias.items():
            if not 0 <= token < vocab_size:
                raise InvalidRequest(
                    f"logit_bias names token {token}; the vocabulary has {vocab_size}",
                    param="logit_bias",
                )
            if not (math.isfinite(bias) and -100 <= bias <= 100):
                raise InvalidRequest(
                    f"logit_bias of token {token} must be between -100 and 100",
                    param="logit_bias",
                )
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequest(
                f"stop_token_ids has more than {MAX_STOP_TOKEN_IDS} entries",
                param="stop_token_ids",
            )
        for token in self.stop_token_ids:
            if not 0 <= token < vocab_size:
                raise InvalidRequest(
                    f"stop_token_ids names token {token}; the vocabulary has {vocab_size}",
                    param="stop_token_ids",
                )


_BOUNDS: tuple[tuple[str, float, float], ...] = (
    ("max_tokens", 1, 1 << 31),
    ("min_tokens", 0, 1 << 31),
    ("seed", 0, SEED_MASK),
    ("temperature", 0.0, 2.0),
    ("top_p", 0.0, 1.0),
    ("top_k", 0, 1 << 31),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.0, 2.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
)


class KvFormat(msgspec.Struct, frozen=True):
    """The stored form of one block; unlike formats must be converted or refused.

    block_size in tokens; dtype as torch names it; codec `raw` stores the pool's own bytes;
    block_bytes is the length of a full block in that codec.
    """

    block_size: int
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_bytes: int
    codec: str = "raw"
    tensor_parallel: int = 1


class Grant(msgspec.Struct, frozen=True):
    """The right to read the blocks of one handoff from one store, while the lease lives.

    It carries no address: `source` is a worker id that the reader resolves for itself. `mac` is
    keyed by a secret of the minting store's `epoch` and covers (grant_id, tenant, epoch, source).
    """

    grant_id: str
    source: str
    epoch: int
    tenant: str
    ttl_s: float
    mac: bytes


class Handoff(msgspec.Struct, frozen=True):
    """The commit record of a handoff: sent when the last block is sealed, never before.

    keys, digests and frames have one entry per block, in sequence order; the last block may be
    partial. `frames` are hints: the reader trusts a frame only if its header holds the key.
    `num_tokens` tokens of KV are covered. kv_format and `numerics` are the writer's: the form of
    its blocks and the class of arithmetic in their keys' root.
    """

    request_id: str
    choice: int
    attempt: int
    grant: Grant
    num_tokens: int
    kv_format: KvFormat
    numerics: str
    keys: tuple[bytes, ...]
    digests: tuple[bytes, ...]
    frames: tuple[int, ...]


class Recast(msgspec.Struct, frozen=True):
    """What blocks become at a reader whose own are others.

    kv_format and numerics are the writer's. keys: those that the reader has for its own full blocks
    of these tokens, from its block `first` of the sequence on.
    """

    kv_format: KvFormat
    numerics: str
    first: int
    keys: tuple[bytes, ...]


class Sealed(msgspec.Struct, frozen=True):
    """Full blocks of one prompt that lie sealed in a store, and the grant that opens them.

    keys, digests and frames have one entry per block, in sequence order, the first of which is
    block `first` of the sequence. What a worker says of a prompt that it computes and hands off,
    or when it is asked to lend what its store holds (`Lend`); the gateway passes it to whoever may
    want to read, with `recast` if its blocks are of another form.
    """

    request_id: str
    choice: int
    attempt: int
    grant: Grant
    first: int
    keys: tuple[bytes, ...]
    digests: tuple[bytes, ...]
    frames: tuple[int, ...]
    recast: Recast | None = None


class Landed(msgspec.Struct, frozen=True):
    """So many blocks of a prompt that a peer had sealed have arrived here early, verified."""

    request_id: str
    choice: int
    attempt: int
    num_blocks: int


class Alone(msgspec.Struct, frozen=True):
    """A suspect is about to have its worker's steps to itself, and waits for leave (`core.alone`).

    Without `begins`: it had to give its blocks back before it has got on, and others go on.
    """

    request_id: str
    choice: int
    attempt: int
    begins: bool = True


class Lend(msgspec.Struct, frozen=True):
    """Ask a worker to open the blocks `keys` of its store, as far as it has them, to a reader.

    The answer is a `Sealed` of the same request, with the leading ones that are there: maybe none.
    `first` is the place of the first key in the sequence.
    """

    request_id: str
    choice: int
    attempt: int
    tenant: str
    first: int
    keys: tuple[bytes, ...]


class Request(msgspec.Struct, frozen=True):
    """One choice of what a client asked, as a worker gets it.

    `emitted` are the tokens that earlier legs produced: they count towards `max_tokens`,
    `min_tokens` and penalties, and the next position drawn is `len(prompt) + len(emitted)`.
    `hand_off` asks this worker to stop after one token and export the KV. `handoff` says whose
    KV to import; `prefix` are blocks of the prompt's beginning that a peer lends. `salt`
    separates tenants' cached blocks. `deadline_s` is what is left, from receipt. `alone`: it was in
    a step that took its worker along, so its first steps are made without others (`core.alone`).
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    choice: int = 0
    attempt: int = 0
    emitted: tuple[int, ...] = ()
    hand_off: bool = False
    handoff: Handoff | None = None
    prefix: Sealed | None = None
    deadline_s: float | None = None
    tenant: str = ""
    salt: bytes = b""
    alone: bool = False


class TokenLogprob(msgspec.Struct, frozen=True):
    """log-probability of one token under the model, before temperature and filters."""

    token_id: int
    logprob: float


class SampledLogprobs(msgspec.Struct, frozen=True):
    """The chosen token's log-probability and the most likely alternatives, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


class TokenDelta(msgspec.Struct, frozen=True):
    """Tokens of one choice from one step.

    `first_index` counts from the first generated token of the choice, `emitted` included, so the
    receiver can refuse a repeat or a gap. `num_cached` is the prefix hit of this attempt, in
    tokens, told with its first delta.
    """

    request_id: str
    choice: int
    attempt: int
    first_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[SampledLogprobs, ...] | None = None
    finish: FinishReason | None = None
    error: WireError | None = None
    num_cached: int | None = None


class StageTimes(msgspec.Struct, frozen=True):
    """Where one leg spent its time, in seconds, from the worker's own monotonic clock.

    Sent once, with the leg's last delta. `started_s` is the time from receipt to the first chunk
    (queue); prefill and decode are until the last prompt token and the last token; export is
    from there to the sealed last block; import is from receipt to the last verified block.
    `num_decoded` tokens were drawn in `decode_s`.
    """

    request_id: str
    choice: int
    attempt: int
    queue_s: float = 0.0
    prefill_s: float = 0.0
    export_s: float = 0.0
    import_s: float = 0.0
    decode_s: float = 0.0
    num_prompt_computed: int = 0
    num_imported_blocks: int = 0
    num_decoded: int = 0


class WorkerLoad(msgspec.Struct, frozen=True):
    """What a worker says of itself after every step.

    Frames are blocks' places in the store: held ones are being written or covered by a lease,
    reserved ones promised to running exports. `num_transfers` are copies and fetches under way.
    """

    num_total_blocks: int = 0
    num_free_blocks: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    step_s: float = 0.0
    store_used_bytes: int = 0
    store_total_bytes: int = 0
    num_held_frames: int = 0
    num_reserved_frames: int = 0
    num_leases: int = 0
    num_transfers: int = 0


class Pulse(msgspec.Struct, frozen=True):
    """A worker's sign of life, which no step holds up; see `core.liveness`.

    `progress` moves while anything is done at all, within a step layer by layer; `is_working`:
    something is being done, and not only waited for; `predicted_s` is what the steps under way are
    expected to take in all. `batch` names the sequences in them, as (request id, choice, attempt),
    if the counter has not moved since the pulse before. `num_copied` are blocks copied into its
    store or out of it, and `is_copying` says that there are more to copy.
    """

    progress: int = 0
    is_working: bool = False
    predicted_s: float = 0.0
    batch: tuple[tuple[str, int, int], ...] = ()
    num_copied: int = 0
    is_copying: bool = False

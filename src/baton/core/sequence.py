"""What the engine knows of one choice of one request.

    ARRIVING ──its early fetches end──▶ WAITING
    WAITING ──admit──▶ RUNNING ──stop, length──▶ FINISHED
       ▲  └──admit, blocks to fetch──▶ IMPORTING ──▶ RUNNING
       └────preempt────── RUNNING ──first token, hand_off──▶ EXPORTING ──commit──▶ FINISHED
    any ──abort, deadline──▶ FINISHED

There is no prefill state and no decode state: `num_computed` catches up with `num_tokens`.
"""

from __future__ import annotations

import enum

from baton.core import keys as content_keys
from baton.core.codec_choice import RAW
from baton.types import Request, StageTimes

SequenceId = tuple[str, int, int]
"""(request id, choice, attempt)"""


class Status(enum.Enum):
    ARRIVING = enum.auto()
    WAITING = enum.auto()
    IMPORTING = enum.auto()
    RUNNING = enum.auto()
    EXPORTING = enum.auto()
    FINISHED = enum.auto()


class Sequence:
    """Mutable; owned by the scheduler and never leaves its process.

    `token_ids` is prompt, emitted and generated tokens, at most `max_tokens` of them; `blocks` the
    block table, which grows in place: a table that differs otherwise is another list; `keys` the
    content keys of the full blocks as far as they have been worked out. `order` counts sequences
    as they come, and `admitted_before` is the age that `prompt_order` knows. With steps in flight,
    `num_scheduled` (tokens computed or being computed) and `num_expected` (tokens there or being
    drawn) run ahead of `num_computed` and `num_tokens`; else they are equal to them. `codec` is
    that of the KV it took over, `origin` names whose arithmetic that KV comes from if it is not our
    own; what it computes from that is of the same numerics class. `leave` is for suspects: None,
    asked for (False), or given (`alone`). `ends_early`: it may end before `max_tokens` are there.
    `num_told`: tokens, from the prompt's first on, that the outside knows; `tells_each`: it is told
    every one when it is drawn (see `Scheduler`). Times are the caller's monotonic seconds, 0.0
    until known.
    """

    __slots__ = (
        "_extend_keys",
        "_lossy_keys",
        "admitted_before",
        "arrived",
        "block_size",
        "blocks",
        "codec",
        "deadline",
        "ends_early",
        "exported",
        "finished",
        "first_scheduled",
        "id",
        "import_done",
        "keys",
        "leave",
        "max_tokens",
        "num_cached",
        "num_computed",
        "num_expected",
        "num_imported_blocks",
        "num_kept",
        "num_preemptions",
        "num_prompt",
        "num_prompt_computed",
        "num_published",
        "num_scheduled",
        "num_told",
        "order",
        "origin",
        "prefilled",
        "request",
        "root",
        "status",
        "tells_each",
        "token_ids",
        "told_cached",
    )

    def __init__(
        self,
        request: Request,
        root: bytes,
        block_size: int,
        now: float,
        extend_keys: content_keys.ExtendKeys = content_keys.extend_chain,
    ) -> None:
        self.request = request
        self.id: SequenceId = (request.id, request.choice, request.attempt)
        self.token_ids: list[int] = [*request.prompt, *request.emitted]
        self.num_prompt = len(request.prompt)
        self.max_tokens = self.num_prompt + request.sampling.max_tokens
        self.ends_early = request.hand_off or bool(request.sampling.stop_token_ids)
        self.block_size = block_size
        self.root = root
        self.codec = RAW
        self.origin = ""
        self.keys: list[bytes] = []
        self._extend_keys = extend_keys
        self._lossy_keys: list[bytes] = []
        self.blocks: list[int] = []
        self.num_computed = 0
        self.num_scheduled = 0
        self.num_expected = self.num_told = len(self.token_ids)
        self.num_published = 0
        self.num_kept = 0
        self.num_cached = 0
        self.told_cached = False
        self.tells_each = True
        self.num_prompt_computed = 0
        self.num_imported_blocks = 0
        self.num_preemptions = 0
        self.leave: bool | None = None
        self.status = Status.WAITING
        self.order = 0
        self.admitted_before = 0
        self.deadline = None if request.deadline_s is None else now + request.deadline_s
        self.arrived = now
        self.first_scheduled = 0.0
        self.import_done = 0.0
        self.prefilled = 0.0
        self.exported = 0.0
        self.finished = 0.0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_generated(self) -> int:
        """Tokens of the answer so far, those of earlier legs included."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_remaining(self) -> int:
        """Tokens whose KV is not known to be computed."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_unscheduled(self) -> int:
        """Tokens that no step was planned for, one that is being drawn included."""
        return self.num_expected - self.num_scheduled

    def full_keys(self, num_tokens: int) -> list[bytes]:
        """Content keys of the full blocks within the first `num_tokens` tokens."""
        wanted = num_tokens // self.block_size
        if len(self.keys) < wanted:
            self._extend_keys(self.keys, self.root, self.token_ids, self.block_size, wanted)
        return self.keys if len(self.keys) == wanted else self.keys[:wanted]

    def class_keys(self, num_tokens: int) -> list[bytes]:
        """As `full_keys`, in the numerics class of this sequence: what its blocks are found by."""
        keys = self.full_keys(num_tokens)
        if not self.origin and (self.codec is RAW or self.codec == RAW):
            return keys
        kv_class = self.origin or self.codec
        lossy = self._lossy_keys
        lossy += [content_keys.lossy_key(key, kv_class) for key in keys[len(lossy) :]]
        return lossy[: len(keys)]

    def handoff_keys(self, num_tokens: int, attempt: int) -> list[bytes]:
        """Keys of all blocks of the first `num_tokens` tokens, as `attempt` hands them off.

        The key of a partial last block is private to that attempt of this request.
        """
        full = self.full_keys(num_tokens)
        tail = self.token_ids[len(full) * self.block_size : num_tokens]
        if not tail:
            return full
        parent = full[-1] if full else self.root
        return [*full, content_keys.private_key(parent, tail, *self.id[:2], attempt)]

    def reset(self) -> None:
        """Forget everything that was computed; the tokens stay."""
        self.blocks = []
        self.num_computed = 0
        self.num_scheduled = 0
        self.num_expected = len(self.token_ids)
        self.num_published = 0
        self.num_kept = 0

    def stage_times(self) -> StageTimes:
        """Where the time of a finished sequence went."""
        took_over = self.request.handoff is not None
        started = self.first_scheduled or self.finished
        # What is fetched after the first token restores a preempted sequence: it is decode's time.
        is_restored = 0.0 < self.prefilled < self.import_done
        computing = started if is_restored else self.import_done or started
        prefilled = computing if took_over else (self.prefilled or self.finished)
        num_drawn = self.num_generated - len(self.request.emitted)
        return StageTimes(
            *self.id,
            queue_s=started - self.arrived,
            import_s=computing - started,
            prefill_s=prefilled - computing,
            export_s=self.exported - prefilled if self.exported else 0.0,
            decode_s=0.0 if self.exported else self.finished - prefilled,
            num_prompt_computed=self.num_prompt_computed,
            num_imported_blocks=self.num_imported_blocks,
            num_decoded=0 if self.exported else max(0, num_drawn - (not took_over)),
        )

"""What one worker can take, and whether a request fits into it."""

from __future__ import annotations

import math

import msgspec

from baton.core.codec_choice import CodecFigures
from baton.errors import InvalidRequest
from baton.types import KvFormat, Request


class SchedulerConfig(msgspec.Struct, frozen=True):
    """Resolved limits of a worker. `fingerprint` and `numerics` root the content keys.

    `keep_blocks`: every full block that is computed goes into the store as well, for the time when
    the pool has evicted it and for peers. `codecs`: what is known of those that this worker can
    read; `max_kl`: nats by which KV that came over a wire may move a next-token distribution.
    """

    kv_format: KvFormat
    num_blocks: int
    num_frames: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    vocab_size: int
    fingerprint: bytes
    numerics: str
    prefix_cache: bool = True
    lease_ttl_s: float = 10.0
    keep_blocks: bool = False
    codecs: tuple[CodecFigures, ...] = ()
    max_kl: float = 0.0

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.kv_format.block_size)

    def validate(self, request: Request) -> None:
        """Check a request against the model and against the worst case of its KV.

        The gateway has checked before; a worker does not rely on it.

        Raises:
            InvalidRequest: it can never run here; `param` names the field.
        """
        request.sampling.validate(self.vocab_size)
        if not request.prompt:
            raise InvalidRequest("the prompt is empty", param="prompt")
        for name, tokens in (("prompt", request.prompt), ("emitted", request.emitted)):
            distinct = set(tokens)
            if tokens and (min(distinct) < 0 or max(distinct) >= self.vocab_size):
                raise InvalidRequest(
                    f"{name} holds a token outside the vocabulary of {self.vocab_size}",
                    param=name,
                )
        if len(request.emitted) >= request.sampling.max_tokens:
            raise InvalidRequest(
                f"max_tokens is {request.sampling.max_tokens} and {len(request.emitted)} tokens "
                "were emitted already: nothing is left to generate",
                param="max_tokens",
            )
        if request.deadline_s is not None and not math.isfinite(request.deadline_s):
            raise InvalidRequest("deadline_s must be a finite number", param="deadline_s")
        num_tokens = len(request.prompt) + len(request.emitted)
        if num_tokens >= self.max_model_len:
            raise InvalidRequest(
                f"the prompt has {num_tokens} tokens; with one to generate, this model serves "
                f"at most {self.max_model_len}",
                param="prompt",
            )
        longest = min(len(request.prompt) + request.sampling.max_tokens, self.max_model_len)
        if self.num_blocks_for(longest) > self.num_blocks:
            raise InvalidRequest(
                f"{longest} tokens of prompt and answer need {self.num_blocks_for(longest)} KV "
                f"blocks; this worker has {self.num_blocks}: ask for fewer tokens, or raise "
                "engine.kv_cache_bytes",
                param="max_tokens",
            )
        if request.hand_off and self.num_blocks_for(num_tokens) > self.num_frames:
            raise InvalidRequest(
                f"a prompt of {num_tokens} tokens needs {self.num_blocks_for(num_tokens)} frames; "
                f"the block store has {self.num_frames}: raise store.max_bytes",
                param="prompt",
            )

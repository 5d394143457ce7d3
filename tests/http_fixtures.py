"""A gateway over real sockets with a made-up model behind it.

`ToyModel` is a `Dispatcher` whose next token is a hash of what came before, so that answers are
reproducible, differ by seed and choice, and hold broken UTF-8 and ends of sequence as real ones do.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import uvicorn
from starlette.types import ASGIApp
from unit import toy_tokenizers

from baton.gateway.dispatch import Readiness, ServedModel
from baton.text.tokenizer import Tokenizer
from baton.types import (
    FinishReason,
    Request,
    SampledLogprobs,
    SamplingParams,
    TokenDelta,
    TokenLogprob,
)


class Target(msgspec.Struct, frozen=True):
    """A running gateway to test. `root` has no trailing slash."""

    root: str
    model: str
    max_model_len: int
    vocab_size: int
    max_body_bytes: int
    api_key: str = "unused"


class ToyModel:
    """`delay_s` is waited before each delta; a delta carries one to three tokens."""

    def __init__(self, vocab_size: int, max_model_len: int = 512, delay_s: float = 0.0) -> None:
        self._served = ServedModel(max_model_len, vocab_size)
        self.delay_s = delay_s
        self.num_running = 0
        self.num_closed_early = 0

    def readiness(self) -> Readiness:
        return Readiness(True)

    def model(self) -> ServedModel | None:
        return self._served

    async def generate(self, request: Request) -> AsyncIterator[TokenDelta]:
        request.sampling.validate(self._served.vocab_size)
        self.num_running += 1
        done = False
        out: list[int] = []
        try:
            while not done:
                await asyncio.sleep(self.delay_s)
                first, batch, lps = len(out), [], []
                finish = None
                for _ in range(1 + len(out) % 3):
                    token = self._next(request, out)
                    out.append(token)
                    batch.append(token)
                    lps.append(self._logprobs(token, request.sampling.logprobs))
                    if token in request.sampling.stop_token_ids:
                        finish = FinishReason.STOP
                    elif len(out) == request.sampling.max_tokens:
                        finish = FinishReason.LENGTH
                    if finish is not None:
                        break
                done = finish is not None
                yield TokenDelta(
                    request_id=request.id,
                    choice=request.choice,
                    attempt=0,
                    first_index=first,
                    token_ids=tuple(batch),
                    logprobs=None if request.sampling.logprobs is None else tuple(lps),
                    finish=finish,
                    num_cached=len(request.prompt) // 16 * 16 if first == 0 else None,
                )
        finally:
            self.num_running -= 1
            self.num_closed_early += not done

    def _next(self, request: Request, out: list[int]) -> int:
        sampling = request.sampling
        forced = [token for token, bias in sampling.logit_bias.items() if bias == 100]
        if forced and (forced[0] not in sampling.stop_token_ids or self._may_stop(sampling, out)):
            return forced[0]
        drawn = (sampling.seed, request.choice) if sampling.temperature > 0 else ()
        state = hashlib.sha256(repr((request.prompt, out[-8:], len(out), drawn)).encode()).digest()
        number = int.from_bytes(state[:8], "big")
        if number % 29 == 0 and self._may_stop(sampling, out):
            return sampling.stop_token_ids[-1]
        token = (number >> 8) % self._served.vocab_size
        while token in sampling.stop_token_ids and not self._may_stop(sampling, out):
            token = (token + 1) % self._served.vocab_size
        return token

    @staticmethod
    def _may_stop(sampling: SamplingParams, out: list[int]) -> bool:
        return bool(sampling.stop_token_ids) and len(out) >= sampling.min_tokens

    def _logprobs(self, token: int, wanted: int | None) -> SampledLogprobs:
        top = tuple(
            TokenLogprob((token + 1 + rank) % self._served.vocab_size, -0.5 - rank)
            for rank in range(wanted or 0)
        )
        return SampledLogprobs(TokenLogprob(token, -1.25), top)


def toy_model_dir(directory: Path) -> Path:
    return toy_tokenizers.write_model_dir(directory, toy_tokenizers.byte_level_bpe())


def toy_model(directory: Path, **kwargs: float) -> tuple[Tokenizer, ToyModel]:
    tokenizer = Tokenizer.from_dir(directory)
    # As for real models, the vocabulary of the weights is padded beyond the tokenizer's.
    return tokenizer, ToyModel(tokenizer.vocab_size + 3, **kwargs)  # type: ignore[arg-type]


@contextmanager
def serve(app: ASGIApp) -> Iterator[str]:
    """Run `app` on a free port, on uvicorn as the product does; gives the root URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        config = uvicorn.Config(
            app, loop="uvloop", http="httptools", ws="none", lifespan="off", log_level="warning",
            access_log=False, timeout_graceful_shutdown=2,
        )  # fmt: skip
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            deadline = time.monotonic() + 10
            while not server.started and time.monotonic() < deadline:
                time.sleep(0.01)
            assert server.started
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()

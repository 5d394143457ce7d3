"""What the suites on real processes share: a tiny model, and a deployment that may be hurt."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from http_fixtures import Target
from integration.deployment import Deployment
from numerics.tiny_models import make_checkpoint
from unit import toy_tokenizers

EOS = 1
VOCAB_SIZE = 408
COMPLETIONS = "/v1/completions"

SMALL = ("--engine.threads", "1", "--engine.num-kv-blocks", "400", "--store.max-bytes", "16777216",
         "--launch.restart-backoff-s", "0.1")  # fmt: skip
"""Flags with which a deployment starts fast and takes little memory."""


def make_model(path: Path, **fields: Any) -> Path:
    """A random Llama in fp32 with a byte-level BPE tokenizer of 401 tokens and a chat template.

    Its vocabulary is padded, as those of real models are.
    """
    path.mkdir(parents=True)
    make_checkpoint(path, "llama", vocab_size=VOCAB_SIZE, eos_token_id=EOS, **fields)
    return toy_tokenizers.write_model_dir(path, toy_tokenizers.byte_level_bpe())


LONG = ("--engine.max-num-batched-tokens", "16", "--engine.num-kv-blocks", "1100")
"""Flags with which `make_long_model` takes many steps, some seconds, for a prompt of thousands."""


def make_long_model(path: Path) -> Path:
    """As `make_model`, for 8192 tokens."""
    return make_model(path, max_position_embeddings=8192)


def prompt_of(length: int, seed: int) -> list[int]:
    """`length` ordinary tokens; prompts of different seeds differ from the first token on."""
    rng = random.Random(seed)
    return [5 + seed % 300, *(rng.randrange(5, 400) for _ in range(length - 1))]


def greedy(model: str, prompt: Any, max_tokens: int) -> dict[str, Any]:
    """The body of a greedy completion that runs to its full length and tells its token ids."""
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    return {**body, "ignore_eos": True, "return_token_ids": True}


def target_of(deployment: Deployment, max_model_len: int) -> Target:
    """As the suites over HTTP want it; with the default bound on bodies."""
    return Target(deployment.url, deployment.model, max_model_len, VOCAB_SIZE, 8 << 20)


class Victim(Deployment):
    """A deployment whose processes a test stops, kills and watches."""

    def http(self, timeout_s: float = 60.0) -> httpx.Client:
        """A client for plain requests; the caller closes it."""
        return httpx.Client(base_url=self.url, timeout=timeout_s, trust_env=False)

    def body(self, prompt: Any, max_tokens: int, **fields: Any) -> dict[str, Any]:
        """Of a greedy completion that runs to its full length."""
        return greedy(self.model, prompt, max_tokens) | fields

    def ask(self, prompt: Any, max_tokens: int, **fields: Any) -> list[int]:
        """The token ids of a greedy completion."""
        with self.http() as client:
            response = client.post(COMPLETIONS, json=self.body(prompt, max_tokens, **fields))
        assert response.status_code == 200, response.text
        ids: list[int] = response.json()["choices"][0]["token_ids"]
        return ids

    def gauge(self, worker: str, name: str) -> float:
        """One series of a worker; 0 before it is there, and while the gateway is away."""
        try:
            return self.counters().get(worker, {}).get(name, 0.0)
        except httpx.TransportError:
            return 0.0

    def is_idle(self) -> bool:
        """No request is open and nothing is held, in any worker that is up."""
        return not self._undrained()

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", timeout=5, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def kill(self, name: str) -> int:
        """SIGKILL to a process; returns its id."""
        pid = self.processes()[name]
        os.kill(pid, signal.SIGKILL)
        return pid

    def signal(self, number: signal.Signals) -> None:
        """To the supervisor."""
        os.kill(self.pid, number)

    def end(self, timeout_s: float = 30.0) -> int:
        """Wait for an end that the test has brought about; returns the exit code."""
        self._stopped = True
        self._closing.close()
        return self._process.wait(timeout_s)

    def left(self, pids: set[int]) -> set[int]:
        """Which of `pids` still run."""
        return {pid for pid in pids if is_alive(pid)}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], object], timeout_s: float = 15.0, what: str = "it") -> float:
    """Poll until `condition()` holds; returns the seconds that it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, f"{what} did not happen"
        time.sleep(0.002)
    return time.monotonic() - started


class Stream:
    """One streamed completion as its client sees it; needs a running event loop.

    It ends with `done` ([DONE] came), with `error` (an answer or an event that tells of one), or
    with `broken` (the connection ended). `ended` is the instant of it, by `time.monotonic()`.
    """

    def __init__(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        self.token_ids: list[int] = []
        self.status = 0
        self.done = False
        self.error: dict[str, Any] | None = None
        self.broken: Exception | None = None
        self.ended = 0.0
        self._client = client
        self._body = {**body, "stream": True}
        self._came = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    async def until_tokens(self, count: int, timeout_s: float = 20.0) -> None:
        """Wait for the first `count` tokens."""
        async with asyncio.timeout(timeout_s):
            while len(self.token_ids) < count:
                assert not self._task.done(), vars(self)
                self._came.clear()
                await self._came.wait()

    async def end(self, timeout_s: float = 60.0) -> None:
        """Wait for its end."""
        async with asyncio.timeout(timeout_s):
            await self._task

    async def leave(self) -> None:
        """Close the connection."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            async with self._client.stream("POST", COMPLETIONS, json=self._body) as response:
                self.status = response.status_code
                if self.status != 200:
                    self.error = json.loads(await response.aread())["error"]
                    return
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        self._event(line.removeprefix("data: "))
        except httpx.TransportError as error:
            self.broken = error
        finally:
            self.ended = time.monotonic()
            self._came.set()

    def _event(self, data: str) -> None:
        assert not self.done, "nothing follows [DONE]"
        assert self.error is None, "nothing follows an error"
        if data == "[DONE]":
            self.done = True
            return
        event = json.loads(data)
        if "error" in event:
            self.error = event["error"]
        for choice in event.get("choices", []):
            self.token_ids += choice.get("token_ids") or []
        self._came.set()


async def until(condition: Callable[[], object], timeout_s: float = 15.0, what: str = "") -> float:
    """`wait_for` beside streams that go on."""
    return await asyncio.to_thread(wait_for, condition, timeout_s, what or repr(condition))


def async_http(deployment: Deployment) -> httpx.AsyncClient:
    """Any number of connections, one a request: a client that leaves closes its own."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=deployment.url, timeout=60, limits=limits, trust_env=False)

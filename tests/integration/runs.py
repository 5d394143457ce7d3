"""Runs of real deployments whose results several suites look at.

Each starts a deployment with decision logs, sends its requests, ends it (which asserts that it is
drained and leaves nothing) and keeps what came of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from integration.deployment import Deployment
from numerics.prompts import TINY_POOL_BLOCKS, long_requests, mixed_requests

AT_ONCE = mixed_requests()
AGAIN = AT_ONCE[:16]
LONG = long_requests()
RUN_REQUESTS = [*AT_ONCE, *AGAIN, *LONG]
"""Prompt and number of tokens to generate of every answer of `run_mixed_prompts`."""
NUM_AT_A_TIME = 4
NUM_STREAMS = 200
STREAM_TOKENS = 24
COMMON_FLAGS = ("--model.dtype", "float32", "--engine.threads", "1")
EXTRA = {"return_token_ids": True, "ignore_eos": True}


@dataclass(frozen=True)
class Answer:
    """One choice as the client saw it. `finishes` has every finish reason that was sent."""

    token_ids: list[int]
    logprobs: list[float]
    finishes: list[str]
    text: str = ""
    prompt: tuple[int, ...] = ()
    num_usages: int = 1


@dataclass(frozen=True)
class Run:
    """`counters` are `Deployment.counters`, `waterfalls` those of /requests, at the end."""

    answers: list[Answer]
    counters: dict[str, dict[str, float]]
    metrics: dict[tuple[str, tuple[tuple[str, str], ...]], float]
    waterfalls: list[dict[str, Any]]
    decision_logs: list[Path]

    def total(self, role: str, event: str) -> float:
        """Of all workers of `role`."""
        return sum(
            events.get(event, 0)
            for worker, events in self.counters.items()
            if worker.startswith(role)
        )


def run_mixed_prompts(model: Path, layout: str, logs: Path) -> Run:
    """`RUN_REQUESTS`, greedily, in chunks, in pools too small for them.

    First 50 prompts of mixed lengths at once. Then some of them again, a few at a time: these are
    placed on workers where others have ended. Then short ones with long answers, all at once.
    """
    flags = (*COMMON_FLAGS, "--log.decision-log", str(logs))
    flags += (
        "--engine.max-num-batched-tokens",
        "96",
        "--engine.num-kv-blocks",
        str(TINY_POOL_BLOCKS),
    )
    with Deployment.start(model, layout, *flags) as served:
        answers = asyncio.run(_ask_all(served))
        return _finish(served, answers, logs)


def run_streams(model: Path, questions: Sequence[str], logs: Path) -> Run:
    """Every question as a streamed chat on `1P1D`, all streams open at once; see `_stream_all`."""
    flags = (*COMMON_FLAGS, "--engine.num-kv-blocks", "4000", "--log.decision-log", str(logs))
    with Deployment.start(model, "1P1D", *flags) as served:
        answers = asyncio.run(_stream_all(served, questions))
        return _finish(served, answers, logs)


def stream_sampling(i: int) -> dict[str, Any]:
    """How stream `i` draws: every other one greedily, the others with a seed each."""
    return {"temperature": 0.0} if i % 2 else {"temperature": 1.0, "seed": 1000 + i}


def _finish(served: Deployment, answers: list[Answer], logs: Path) -> Run:
    served.check_drained()
    run = Run(
        answers, served.counters(), served.metrics(), served.requests(), sorted(logs.iterdir())
    )
    served.stop()
    return run


async def _ask_all(served: Deployment) -> list[Answer]:
    async with served.async_client() as client:

        async def ask(prompt: list[int], num_tokens: int) -> Answer:
            reply = await client.completions.create(
                model=served.model,
                prompt=prompt,
                max_tokens=num_tokens,
                temperature=0,
                logprobs=1,
                extra_body=EXTRA,
            )
            (choice,) = reply.choices
            assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
            logprobs = choice.logprobs.token_logprobs
            return Answer(choice.token_ids, logprobs, [choice.finish_reason])

        few = asyncio.Semaphore(NUM_AT_A_TIME)

        async def ask_in_turn(prompt: list[int], num_tokens: int) -> Answer:
            async with few:
                return await ask(prompt, num_tokens)

        answers = await asyncio.gather(*(ask(*request) for request in AT_ONCE))
        answers += await asyncio.gather(*(ask_in_turn(*request) for request in AGAIN))
        return answers + await asyncio.gather(*(ask(*request) for request in LONG))


async def _stream_all(served: Deployment, questions: Sequence[str]) -> list[Answer]:
    """No stream is read to its end before all have begun, so all of them are open together."""
    everyone = asyncio.Barrier(len(questions))
    async with served.async_client() as client:

        async def ask(i: int, question: str) -> Answer:
            stream = await client.chat.completions.create(
                model=served.model,
                messages=[{"role": "user", "content": question}],
                max_tokens=STREAM_TOKENS,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"return_token_ids": True},
                **stream_sampling(i),
            )
            return await _read(stream, everyone)

        async with asyncio.timeout(100):
            return await asyncio.gather(*(ask(i, text) for i, text in enumerate(questions)))


async def _read(
    stream: openai.AsyncStream[openai.types.chat.ChatCompletionChunk], everyone: asyncio.Barrier
) -> Answer:
    tokens: list[int] = []
    finishes: list[str] = []
    prompt: tuple[int, ...] = ()
    text, num_usages, begun = "", 0, False
    async for chunk in stream:
        if not begun:
            begun = True
            prompt = tuple(chunk.prompt_token_ids)
            await everyone.wait()
        for choice in chunk.choices:
            assert not finishes, "a chunk after the last one"
            tokens += getattr(choice, "token_ids", [])  # the first chunk names only the role
            text += choice.delta.content or ""
            if choice.finish_reason is not None:
                finishes.append(choice.finish_reason)
        if chunk.usage is not None:
            assert finishes and chunk.usage.completion_tokens == len(tokens)
            num_usages += 1
    return Answer(tokens, [], finishes, text, prompt, num_usages)

"""A store that is full, and deadlines: waiting, or a typed end, and never a leak."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
from faults.served import (
    COMPLETIONS,
    LONG,
    SMALL,
    Stream,
    Victim,
    async_http,
    make_long_model,
    prompt_of,
)

TINY_STORE = 1 << 20
TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """Its store takes the blocks of 85 times 16 tokens; requests have two seconds."""
    model = make_long_model(tmp_path_factory.mktemp("served") / "org-long")
    flags = [*SMALL, *LONG, "--engine.max-num-batched-tokens", "64"]
    flags += ["--store.max-bytes", str(TINY_STORE)]
    flags += ["--gateway.request-timeout-s", f"{TIMEOUT_S:g}"]
    with Victim.start(model, "1P1D", *flags) as deployment:
        assert isinstance(deployment, Victim)
        yield deployment


def test_a_full_store_makes_prompts_wait(served: Victim) -> None:
    """Six prompts of 40 blocks want 240 of 85 frames: two at a time, and all of them right."""
    prompts = [prompt_of(640, seed) for seed in range(6)]
    wanted = [served.ask(prompt, 10) for prompt in prompts]
    waits = served.gauge("prefill-0", "store_full_waits")

    async def run() -> list[Stream]:
        async with async_http(served) as client:
            streams = [Stream(client, served.body([9, *prompt], 10)) for prompt in prompts]
            streams += [Stream(client, served.body(prompt, 10)) for prompt in prompts]
            for stream in streams:
                await stream.end()
            return streams

    streams = asyncio.run(run())
    assert all(stream.done and len(stream.token_ids) == 10 for stream in streams)
    assert [stream.token_ids for stream in streams[6:]] == wanted
    assert served.gauge("prefill-0", "store_full_waits") > waits


def test_a_prompt_larger_than_the_store_is_refused(served: Victim) -> None:
    with served.http() as client:
        response = client.post(COMPLETIONS, json=served.body(prompt_of(2000, 20), 5))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "prompt")
    assert "store.max_bytes" in error["message"]


def test_deadlines(served: Victim) -> None:
    """In the stream, before the stream, and unstreamed: an error of its own, on time."""
    wanted = served.ask(prompt_of(30, 31), 100)

    async def run() -> None:
        async with async_http(served) as client:
            started = time.monotonic()
            stream = Stream(client, served.body(prompt_of(30, 31), 8000))
            whole = asyncio.create_task(
                client.post(COMPLETIONS, json=served.body(prompt_of(30, 32), 8000, n=4))
            )
            response = await whole
            assert response.status_code == 504
            assert response.json()["error"]["code"] == "deadline_exceeded"
            assert TIMEOUT_S - 0.1 <= time.monotonic() - started < TIMEOUT_S + 1
            await stream.end()
            assert TIMEOUT_S - 0.1 <= stream.ended - started < TIMEOUT_S + 1
            assert stream.status == 200
            assert not stream.done
            assert stream.error is not None
            assert stream.error["code"] == "deadline_exceeded"
            assert len(stream.token_ids) > 100
            assert stream.token_ids[:100] == wanted

    asyncio.run(run())
    served.until(served.is_idle, 1.0, "freeing what ran out of time")
    assert served.ask(prompt_of(30, 31), 100) == wanted

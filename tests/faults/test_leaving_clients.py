"""Clients that leave, in every phase: their work ends in both workers, the others' goes on."""

from __future__ import annotations

import asyncio
import random
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
    until,
)

# One step takes some milliseconds; what is measured includes the polling, over HTTP, of a metric.
FREED_S = 1.0


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    model = make_long_model(tmp_path_factory.mktemp("served") / "org-long")
    with Victim.start(model, "1P1D", *SMALL, *LONG) as deployment:
        assert isinstance(deployment, Victim)
        yield deployment


async def freed(served: Victim) -> None:
    seconds = await until(served.is_idle, FREED_S, "freeing what a client left")
    print(f"freed_s={seconds:.3f}")


def test_mid_stream(served: Victim) -> None:
    async def run() -> None:
        aborts = served.gauge("decode-0", "aborts")
        async with async_http(served) as client:
            streams = [Stream(client, served.body(prompt_of(30, seed), 4000)) for seed in range(3)]
            for stream in streams:
                await stream.until_tokens(20)
            assert served.gauge("decode-0", "num_requests_running") == 3
            for stream in streams:
                await stream.leave()
            await freed(served)
        assert served.gauge("decode-0", "aborts") == aborts + 3
        generated = served.gauge("decode-0", "tokens_generated")
        assert len(served.ask(prompt_of(5, 9), 3)) == 3
        assert served.gauge("decode-0", "tokens_generated") == generated + 2  # and no other's

    asyncio.run(run())


@pytest.mark.parametrize("num_requests", [1, 24], ids=["running", "waiting too"])
def test_unstreamed_while_prompts_are_computed(served: Victim, num_requests: int) -> None:
    async def run() -> None:
        computed = served.gauge("prefill-0", "tokens_computed")
        decoded = served.gauge("decode-0", "tokens_computed")
        async with async_http(served) as client:
            asked = [
                asyncio.create_task(
                    client.post(COMPLETIONS, json=served.body(prompt_of(6000, 100 + number), 8))
                )
                for number in range(num_requests)
            ]
            await until(lambda: served.gauge("prefill-0", "num_requests_running") > 0)
            if num_requests > 1:
                await until(lambda: served.gauge("prefill-0", "num_requests_waiting") > 10)
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            await freed(served)
        assert served.gauge("prefill-0", "tokens_computed") - computed < 5000
        assert served.gauge("decode-0", "tokens_computed") == decoded

    asyncio.run(run())


def test_at_the_handoff(served: Victim) -> None:
    """The first token leaves before the commit record: who leaves on it leaves in the handoff."""

    async def run() -> None:
        before = served.gauge("prefill-0", "aborts") + served.gauge("decode-0", "aborts")
        async with async_http(served) as client:
            for number in range(24):
                stream = Stream(client, served.body(prompt_of(500, 200 + number), 2000))
                await stream.until_tokens(1)
                await asyncio.sleep(number % 8 * 0.001)  # each at another point of it
                await stream.leave()
            await freed(served)
        after = served.gauge("prefill-0", "aborts") + served.gauge("decode-0", "aborts")
        assert 0 < after - before <= 24  # some are nobody's in that moment, and end all the same

    asyncio.run(run())


def test_one_of_several_choices_keeps_no_other_back(served: Victim) -> None:
    """All choices of a client that leaves end, while the neighbours' answers stay right."""

    async def run() -> None:
        prompt = prompt_of(40, 77)
        wanted = await asyncio.to_thread(served.ask, prompt, 150)
        async with async_http(served) as client:
            leaver = Stream(client, served.body(prompt_of(40, 78), 4000, n=6, temperature=1))
            neighbour = Stream(client, served.body(prompt, 150))
            await leaver.until_tokens(30)
            await leaver.leave()
            await neighbour.end()
        assert (neighbour.done, neighbour.token_ids) == (True, wanted)

    asyncio.run(run())
    served.until(served.is_idle, FREED_S, "freeing six choices")


def test_abort_storm(served: Victim) -> None:
    """90 of 100 streams are cancelled, each at another point; the other ten are right."""

    async def run() -> None:
        rng = random.Random(5)
        stayers = list(range(0, 100, 10))
        prompts = [prompt_of(rng.choice([3, 40, 200]), 300 + number) for number in range(100)]
        wanted = {}
        for number in stayers:
            wanted[number] = await asyncio.to_thread(served.ask, prompts[number], 60)
        async with async_http(served) as client:
            streams = [
                Stream(client, served.body(prompts[number], 60 if number in stayers else 3000))
                for number in range(100)
            ]

            async def leave(number: int) -> None:
                await asyncio.sleep(rng.random() * 1.5)
                await streams[number].leave()

            await asyncio.gather(*(leave(n) for n in range(100) if n not in stayers))
            for number in stayers:
                await streams[number].end()
            await freed(served)
        for number in stayers:
            assert streams[number].done
            assert streams[number].token_ids == wanted[number]

    asyncio.run(run())

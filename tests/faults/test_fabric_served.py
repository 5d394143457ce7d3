"""Faults of the KV fabric among real processes: every answer is right, and nothing is left.

Two deployments, shared by all tests: in one, blocks are fetched when the prompt is done, by one
read of all of them; in the other as they are sealed, a read each, out of the smallest store there
is. Each test hurts the way between prefill and decode worker, or an end of it, sees that the fault
struck and was counted, and leaves a deployment that is whole, empty and right.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from faults.by_hand import LEASE_TTL_S, READ_S, ByHand
from faults.served import LONG, Stream, Victim, prompt_of
from parts.fault_proxy import (
    AnyFault,
    Cut,
    Duplicate,
    Flip,
    Freeze,
    Reorder,
    Replay,
    Throttle,
    Truncate,
)

pytest_plugins = ["faults.expected"]

NUM_TOKENS = 8
NUM_PROMPT = 400
"""25 blocks of about 12 kB each."""
AT = 100_000
"""A byte of a block in the middle of them."""
MEGABIT = 125_000
SMALLEST_STORE = 1 << 20

seeds = itertools.count(1)


def new_prompt(length: int = NUM_PROMPT) -> list[int]:
    """Tokens of which no worker has seen the beginning."""
    return prompt_of(length, next(seeds))


@pytest.fixture(scope="module")
def fetching_after(model: Path) -> Iterator[ByHand]:
    with ByHand.start(model, "--fabric.fetch-early", "false") as served:
        yield served


@pytest.fixture(scope="module")
def fetching_early(model: Path) -> Iterator[ByHand]:
    with ByHand.start(model, *LONG, "--store.max-bytes", str(SMALLEST_STORE)) as served:
        yield served


@pytest.fixture
def whole(expected: Victim) -> Iterator[list[ByHand]]:
    """A test puts in here what it hurts: afterwards it is as if nothing had been."""
    hurt: list[ByHand] = []
    yield hurt
    for served in hurt:
        served.proxy.up, served.proxy.down = [], []
        served.proxy.drop()
        served.until_whole()
        served.check_drained()
        lost, prompt = served.lost(), new_prompt()
        assert served.ask(prompt, NUM_TOKENS) == expected.ask(prompt, NUM_TOKENS)
        served.check_drained()
        assert served.lost() == lost, "without a fault nothing falls back"


@pytest.fixture
def after(fetching_after: ByHand, whole: list[ByHand]) -> ByHand:
    whole.append(fetching_after)
    return fetching_after


@pytest.fixture
def early(fetching_early: ByHand, whole: list[ByHand]) -> ByHand:
    whole.append(fetching_early)
    return fetching_early


@pytest.fixture(params=["after", "early"])
def served(request: pytest.FixtureRequest) -> ByHand:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, ByHand)
    return found


def inject(served: ByHand, *down: AnyFault) -> None:
    """For every connection from now on; those that there are end."""
    served.proxy.down = list(down)
    served.proxy.hits.clear()
    served.proxy.drop()


def grown(served: ByHand, before: dict[str, float]) -> dict[str, float]:
    """Of `lost`: what has come since `before`."""
    return {
        name: total - before.get(name, 0.0)
        for name, total in served.lost().items()
        if total != before.get(name, 0.0)
    }


def test_no_fallbacks_without_faults(served: ByHand, expected: Victim) -> None:
    inject(served)
    before, blocks = served.lost(), served.counters()["decode-0"]
    for length in (1, 15, 16, 17, NUM_PROMPT):
        prompt = new_prompt(length)
        assert served.ask(prompt, NUM_TOKENS) == expected.ask(prompt, NUM_TOKENS)
    assert grown(served, before) == {}
    now = served.counters()["decode-0"]
    assert now["prompt_tokens_computed"] == blocks["prompt_tokens_computed"]
    ways = ("imported_blocks", "early_blocks")
    came = sum(now.get(way, 0.0) - blocks.get(way, 0.0) for way in ways)
    assert came == 1 + 1 + 1 + 2 + NUM_PROMPT // 16
    assert sum(len(down) for _, down in served.proxy.recorded) > AT, "by way of the proxy"


# The way ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Flip(AT, bit=3), "corrupt"),
        (Truncate(AT), "unreachable"),
        (Cut(AT), "unreachable"),
        (Duplicate(AT, 500), "corrupt"),
        (Reorder(AT, 500, 700), "corrupt"),
        (Freeze(AT), "timed_out"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, AnyFault) else None,
)
def test_bytes_that_go_wrong(
    served: ByHand, expected: Victim, fault: AnyFault, reason: str
) -> None:
    prompt = new_prompt()
    before = served.lost()
    inject(served, fault)
    assert served.ask(prompt, NUM_TOKENS) == expected.ask(prompt, NUM_TOKENS)
    assert served.proxy.hits[type(fault).__name__] >= 1
    assert any(name.endswith(f"_{reason}") for name in grown(served, before))


def test_an_answer_from_before(served: ByHand, expected: Victim) -> None:
    first, prompt = new_prompt(), new_prompt()
    inject(served)
    served.ask(first, NUM_TOKENS)
    down = max((down for _, down in served.proxy.recorded), key=len)
    assert len(down) > AT, "the answers to the first request"
    before = served.lost()
    inject(served, Replay(down))
    assert served.ask(prompt, NUM_TOKENS) == expected.ask(prompt, NUM_TOKENS)
    assert served.proxy.hits["Replay"] >= 1
    assert any(name.endswith("unreachable") for name in grown(served, before))


def test_a_slow_way_holds_up_nobody_else(served: ByHand, expected: Victim) -> None:
    """At 1 Mbit/s a prompt's blocks do not come in time; a stream that has its own goes on."""
    running, slow = new_prompt(20), new_prompt()
    before = served.lost()

    async def run() -> tuple[Stream, list[int], int, float]:
        async with httpx.AsyncClient(base_url=served.url, timeout=60, trust_env=False) as client:
            stream = Stream(client, served.body(running, 5000))
            await stream.until_tokens(5)
            inject(served, Throttle(MEGABIT))
            asked = asyncio.create_task(asyncio.to_thread(served.ask, slow, NUM_TOKENS))
            while not served.proxy.hits["Throttle"]:
                await asyncio.sleep(0.005)
            num_before, started = len(stream.token_ids), time.monotonic()
            tokens = await asked
            assert not stream.ended, "it went on all the time"
            num_meanwhile = len(stream.token_ids) - num_before
            elapsed_s = time.monotonic() - started
            await stream.leave()
            return stream, tokens, num_meanwhile, elapsed_s

    stream, tokens, num_meanwhile, elapsed_s = asyncio.run(run())
    assert tokens == expected.ask(slow, NUM_TOKENS)
    assert stream.error is None and stream.broken is None
    wanted = expected.ask(running, len(stream.token_ids))
    assert stream.token_ids == wanted
    assert any(name.endswith("timed_out") for name in grown(served, before))
    assert elapsed_s > READ_S / 2
    assert num_meanwhile > 20


# Its ends -----------------------------------------------------------------------------------------


def test_a_source_that_dies_before_its_blocks_come(after: ByHand, expected: Victim) -> None:
    """The handoff is with the decode worker, which is reading: it computes the rest itself."""
    prompt = new_prompt()
    before = after.lost()
    inject(after, Freeze(AT))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(after.ask, prompt, NUM_TOKENS)
        after.until(lambda: after.proxy.hits["Freeze"], "the read")
        after.kill("prefill-0")
        tokens = asked.result(30)
    assert tokens == expected.ask(prompt, NUM_TOKENS)
    assert sum(grown(after, before).values()) == 1
    after.run("prefill-0")


def test_a_source_that_stands_still(after: ByHand, expected: Victim) -> None:
    prompt = new_prompt()
    before = after.lost()
    inject(after)
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as still:
        with after.stopped("decode-0"):
            asked = pool.submit(after.ask, prompt, NUM_TOKENS)
            after.until_handed_off()
            still.enter_context(after.stopped("prefill-0"))
        started = time.monotonic()
        tokens = asked.result(30)
        elapsed_s = time.monotonic() - started
    assert tokens == expected.ask(prompt, NUM_TOKENS)
    assert grown(after, before) == {"decode-0: fallback_import_timed_out": 1}
    assert READ_S - 0.1 < elapsed_s < READ_S + 5, "it waits for the source no longer than that"


def test_a_source_that_is_another_by_now(after: ByHand, expected: Victim) -> None:
    """The grant is of the last start of the worker that now listens there."""
    prompt = new_prompt()
    before = after.lost()
    inject(after)
    with ThreadPoolExecutor(1) as pool:
        with after.stopped("decode-0"):
            asked = pool.submit(after.ask, prompt, NUM_TOKENS)
            after.until_handed_off()
            after.kill("prefill-0")
            after.until(lambda: not after.counter("prefill-0", "up"), "its leaving")
            after.run("prefill-0")
            after.until_whole()
        tokens = asked.result(30)
    assert tokens == expected.ask(prompt, NUM_TOKENS)
    assert grown(after, before) == {"decode-0: fallback_import_stale_epoch": 1}


def test_a_lease_that_lapses_before_the_read(after: ByHand, expected: Victim) -> None:
    """Nobody renews it while the gateway stands still; the store then refuses its blocks."""
    prompt = new_prompt()
    before = after.lost()
    expired = after.counter("prefill-0", "leases_expired")
    inject(after)
    with ThreadPoolExecutor(1) as pool:
        with after.stopped("decode-0"):
            asked = pool.submit(after.ask, prompt, NUM_TOKENS)
            after.until_handed_off()
            with after.stopped("gateway"):
                time.sleep(LEASE_TTL_S + 0.5)
            after.until(
                lambda: after.counter("prefill-0", "leases_expired") == expired + 1, "its end"
            )
        tokens = asked.result(30)
    assert tokens == expected.ask(prompt, NUM_TOKENS)
    assert grown(after, before) == {"decode-0: fallback_import_refused": 1}

"""Whole deployments whose blocks travel through NIXL: on one host, and between two."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faults.served import LONG, SMALL, Victim, prompt_of
from two_hosts import HERE, THERE, Network, TwoHosts

pytest_plugins = ["faults.expected"]

PROMPTS = [prompt_of(length, seed) for seed, length in enumerate((1, 15, 16, 17, 200, 700))]
NUM_BLOCKS = 1 + 1 + 1 + 2 + 13 + 44
NUM_TOKENS = 24
HEALED_S = 60.0
BETWEEN = ("--fabric.between-hosts", "nixl", "--fabric.allow-insecure")


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network.open() as network:
        yield network


def check(of: dict[str, float], said: str) -> None:
    """The decode worker computed no prompt, and all blocks came through NIXL."""
    assert of["prompt_tokens_computed"] == 0
    assert of["blocks_by_nixl"] == NUM_BLOCKS
    assert not of.keys() & {"blocks_by_shm", "blocks_by_tcp"}
    assert "source=prefill-0 name=nixl reason=" in said


def test_on_one_host(model: Path, expected: Victim) -> None:
    wanted = [expected.ask(prompt, NUM_TOKENS) for prompt in PROMPTS]
    with Victim.start(model, "1P1D", *SMALL, *LONG, "--fabric.transport", "nixl") as served:
        assert isinstance(served, Victim)
        assert [served.ask(prompt, NUM_TOKENS) for prompt in PROMPTS] == wanted
        check(served.counters()["decode-0"], served.output)


@pytest.mark.timeout(300)
def test_between_two_hosts(network: Network, model: Path, expected: Victim) -> None:
    """Through UCX over TCP; then the wire is cut before a handoff's blocks are read."""
    wanted = [expected.ask(prompt, NUM_TOKENS) for prompt in PROMPTS]
    where = {"prefill-0": THERE, "decode-0": HERE}
    flags = (*LONG, "--fabric.fetch-early", "false", *BETWEEN)
    started = TwoHosts.start(network, model, where, *flags, environment={"UCX_TLS": "tcp"})
    with started as served:
        assert [served.ask(prompt, NUM_TOKENS) for prompt in PROMPTS] == wanted
        check(served.counters()["decode-0"], served.output("decode-0"))
        assert served.lost() == {}

        prompt = prompt_of(400, 40)
        with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as cut:
            with served.stopped("decode-0"):
                asked = pool.submit(served.ask, prompt, NUM_TOKENS)
                served.until_handed_off()
                cut.enter_context(served.network.cut())
            tokens = asked.result(30)
        assert tokens == expected.ask(prompt, NUM_TOKENS)
        (lost,) = served.lost()
        assert lost.startswith("decode-0: fallback_import_")

        served.until_whole()
        seeds = iter(range(41, 400))
        limit = time.monotonic() + HEALED_S
        while True:  # the read that was cut off has to end first, one way or the other
            before, prompt = served.lost(), prompt_of(400, next(seeds))
            assert served.ask(prompt, NUM_TOKENS) == expected.ask(prompt, NUM_TOKENS)
            if served.lost() == before:
                break
            assert time.monotonic() < limit, served.output("decode-0")[-3000:]
            time.sleep(0.5)
        served.check_drained()

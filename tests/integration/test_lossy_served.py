"""Blocks in a lossy codec among real processes: chosen by what was measured, kept apart.

The codecs' losses stand in a calibration file, the link's rate is measured on the blocks that come
over it, through a proxy that holds it down; what is chosen is what both allow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from faults.by_hand import ByHand
from faults.served import Stream, Victim, prompt_of
from parts.fault_proxy import Throttle

from baton.fabric import codec_native
from baton.fabric.calibration import VERSION, Calibration, CodecLoss, save_calibration
from baton.model.fingerprint import weights_fingerprint

pytest_plugins = ["faults.expected"]

BYTES_PER_S = 3e6
NUM_TOKENS = 40
NUM_PROMPT = 395
"""24 full blocks and one with 11 tokens: 300 kB, at least 100 ms of the link."""
NUM_BLOCKS = -(-NUM_PROMPT // 16)
LATE = ("--fabric.fetch-early", "false")


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ByHand]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        save_calibration(calibration_of(model))
        with ByHand.start(model, "--fabric.max-kl", "0.01", *LATE) as served:
            served.proxy.down = [Throttle(BYTES_PER_S)]
            yield served


def calibration_of(model: Path) -> Calibration:
    """As `baton fabric calibrate` writes it; the usual budget of 0.01 leaves int8 alone."""
    losses = {"int8": 0.001, "fp8": 0.02, "int4": 0.05}
    return Calibration(
        VERSION, codec_native.VERSION, weights_fingerprint(model).hex(), "test", "float32", 16,
        "today", "test", "", 1, {name: CodecLoss(1.0, kl, kl, kl) for name, kl in losses.items()},
    )  # fmt: skip


def stream(served: ByHand, prompt: list[int]) -> Stream:
    """A streamed completion, run to its end."""

    async def run() -> Stream:
        async with httpx.AsyncClient(base_url=served.url, timeout=60, trust_env=False) as client:
            asked = Stream(client, served.body(prompt, NUM_TOKENS))
            await asked.end()
            return asked

    return asyncio.run(run())


def lossy(served: ByHand) -> dict[str, float]:
    counters = served.counters()["decode-0"]
    return {name: count for name, count in counters.items() if name.startswith("lossy_blocks_")}


def test_a_slow_link_takes_a_codec_and_keeps_its_blocks_apart(
    served: ByHand, expected: Victim
) -> None:
    first, prompt, new_text = (prompt_of(NUM_PROMPT, seed) for seed in (1, 2, 3))
    new_text = new_text[:20]
    # The first request finds a link that nobody has measured: raw, and exact.
    assert stream(served, first).token_ids == expected.ask(first, NUM_TOKENS)
    assert served.proxy.hits["Throttle"]
    assert lossy(served) == {}

    before = served.counters()
    answer = stream(served, prompt)
    assert answer.done and answer.error is None and answer.broken is None
    assert len(answer.token_ids) == NUM_TOKENS
    # All of it came encoded, the partial last block included.
    assert lossy(served) == {"lossy_blocks_int8": NUM_BLOCKS}
    # Token 1 is the prefill worker's, which computed all of the prompt.
    assert answer.token_ids[0] == expected.ask(prompt, 1)[0]

    # The same once more over the same link finds them, but for the partial one.
    again = stream(served, prompt)
    assert again.token_ids == answer.token_ids
    assert lossy(served) == {"lossy_blocks_int8": NUM_BLOCKS + 1}

    # What the decode worker computed of the answer is of that class as well: it has nothing to
    # lend to an exact look-up, so the next turn's prompt is computed, and its first token exact.
    served.check_drained()
    counters = served.counters()
    turn = [*prompt, *answer.token_ids, *new_text]
    assert stream(served, turn).token_ids[0] == expected.ask(turn, 1)[0]
    after = served.counters()
    assert after["decode-0"]["lent_blocks"] == before["decode-0"]["lent_blocks"] == 0
    computed = (
        after["prefill-0"]["prompt_tokens_computed"]
        - counters["prefill-0"]["prompt_tokens_computed"]
    )
    assert computed == len(turn) - NUM_PROMPT // 16 * 16
    assert served.lost() == {}
    served.check_drained()


def test_the_next_turn_over_a_link_that_was_not_measured_is_lent_what_was_kept(
    served: ByHand, expected: Victim
) -> None:
    """The counter-proof: kept blocks of an exact answer are lent, so the look-up itself works."""
    served.kill("decode-0")
    served.until(lambda: not served.counter("decode-0", "up"), "its leaving")
    served.run("decode-0")
    served.until_whole()
    prompt, new_text = prompt_of(NUM_PROMPT, 4), prompt_of(20, 5)
    answer = stream(served, prompt)
    assert answer.token_ids == expected.ask(prompt, NUM_TOKENS)
    served.check_drained()
    lent = served.counter("decode-0", "lent_blocks")
    turn = [*prompt, *answer.token_ids, *new_text]
    assert stream(served, turn).token_ids[0] == expected.ask(turn, 1)[0]
    assert served.counter("decode-0", "lent_blocks") - lent == (
        (NUM_PROMPT + NUM_TOKENS - 1) // 16 - NUM_PROMPT // 16
    )

"""KV that travels before it is asked for, and KV that is not computed a second time."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.served import LONG, SMALL, Victim, prompt_of

pytest_plugins = ["faults.expected"]

BLOCK_SIZE = 16


def test_most_of_a_long_prompt_arrives_before_its_last_chunk_is_computed(
    model: Path, expected: Victim
) -> None:
    prompt = prompt_of(400, seed=1)
    with Victim.start(model, "1P1D", *SMALL, *LONG) as served:
        tokens = served.ask(prompt, 8)
        (waterfall,) = served.requests()
        counters = served.counters()["decode-0"]
    assert tokens == expected.ask(prompt, 8)
    # 25 blocks in 25 steps; each is told of as it is sealed.
    assert waterfall["num_early_blocks"] >= 20
    assert counters["early_blocks"] >= waterfall["num_early_blocks"]
    # The rest waited for the handoff; a block that was there is not fetched again.
    assert counters["early_blocks"] + counters["imported_blocks"] == 400 // BLOCK_SIZE
    assert counters["prompt_tokens_computed"] == 0


@pytest.mark.parametrize(("num_prompt", "num_answer"), [(200, 100), (1700, 300)])
@pytest.mark.parametrize("layout", ["1P1D", "2P1D"])
def test_the_next_turn_of_a_chat_computes_its_new_text_only(
    model: Path, expected: Victim, layout: str, num_prompt: int, num_answer: int
) -> None:
    # Each in a deployment of its own: where a worker has fetched, its router knows what fetching
    # takes, and may rightly find it quicker to compute the turn anew with so small a model.
    with Victim.start(model, layout, *SMALL) as served:
        check_next_turn(served, expected, prompt_of(num_prompt, num_prompt), num_answer)


def test_so_it_is_where_short_turns_were_fetched_before(model: Path, expected: Victim) -> None:
    """A fetch of one block takes as long as one of many, nearly, and must not make that seem dear.
    In steps of 4 tokens even this model takes longer to compute hundreds than to fetch them."""
    slow = ("--engine.max-num-batched-tokens", "4", "--engine.max-num-seqs", "4")
    with Victim.start(model, "1P1D", *SMALL, *slow) as served:
        for seed, (num_prompt, num_answer) in enumerate([(200, 20), (210, 400), (220, 300)]):
            check_next_turn(served, expected, prompt_of(num_prompt, 30 + seed), num_answer)


def check_next_turn(served: Victim, expected: Victim, history: list[int], num_answer: int) -> None:
    """A chat of that many tokens, and a turn more: what of it is computed, and what it says."""
    new_text = prompt_of(21, seed=3)
    answer = served.ask(history, num_answer)
    served.until(served.is_idle)  # the last blocks are kept
    before = served.counters()
    turn = [*history, *answer, *new_text]
    tokens = served.ask(turn, 8)
    after = served.counters()
    assert tokens == expected.ask(turn, 8)

    def grown(name: str, role: str) -> float:
        return sum(after[worker][name] - before[worker][name] for worker in after if role in worker)

    assert grown("lent_blocks", "decode") == (len(history) + len(answer) - 1) // BLOCK_SIZE - (
        len(history) // BLOCK_SIZE
    )
    assert grown("imported_blocks", "prefill") >= grown("lent_blocks", "decode")
    assert grown("prompt_tokens_computed", "decode") == 0
    assert grown("prompt_tokens_computed", "prefill") <= BLOCK_SIZE + len(new_text)


def test_evicted_blocks_come_back_from_the_workers_own_store(model: Path, expected: Victim) -> None:
    prompt = prompt_of(300, seed=4)
    # A KV cache of 40 blocks, and a store that holds many times as much.
    flags = (*SMALL, "--engine.num-kv-blocks", "40")
    with Victim.start(model, "1U", *flags) as served:
        first = served.ask(prompt, 8)
        for seed in range(5, 9):
            served.ask(prompt_of(500, seed), 8)
        before = served.counters()["unified-0"]
        again = served.ask(prompt, 8)
        after = served.counters()["unified-0"]
    assert first == again == expected.ask(prompt, 8)
    assert after["restored_blocks"] - before["restored_blocks"] == 300 // BLOCK_SIZE
    computed = after["prompt_tokens_computed"] - before["prompt_tokens_computed"]
    assert computed == 300 % BLOCK_SIZE

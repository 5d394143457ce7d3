"""bf16 engines against transformers in fp32 on the same weights: equal up to near-ties.

In bf16 a logit is rounded to 8 bits, and which of two nearly equal tokens wins depends on the
order of summation. So each token of each answer is judged where it stands, after the tokens
before it: its fp32 logit must come within `MARGIN` of the best one's. The logits of these models
have a standard deviation of 1.6, and the best token is about 4 above the mean. `MARGIN` is what the
rarest rounding may cost; the sharp test is that the mean shortfall is less than that of
transformers' own bf16 arithmetic.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from numerics.checkpoints import make_served_checkpoint
from numerics.engines import Engines
from numerics.prompts import ARCHITECTURES, TINY_POOL_BLOCKS, long_requests, mixed_requests
from numerics.tiny_models import reference_logits, reference_model

MARGIN = 0.75
MAX_MEAN_SHORTFALL = 0.0025
MAX_SHARE_NOT_BEST = 0.05


@pytest.mark.parametrize("layout", ["1U", "1P1D"])
@pytest.mark.parametrize("variant", ARCHITECTURES)
def test_greedy_answers_equal_transformers_up_to_near_ties(
    tmp_path: Path, variant: str, layout: str
) -> None:
    torch.set_num_threads(1)
    path = make_served_checkpoint(tmp_path / "model", variant, dtype="bfloat16")
    requests = mixed_requests() + long_requests()
    options = {"engine.max_num_batched_tokens": 96, "engine.num_kv_blocks": TINY_POOL_BLOCKS}
    with Engines(path, layout, **options).running() as engines:
        answers = engines.generate(mixed_requests()) + engines.generate(long_requests())
    assert [len(answer.token_ids) for answer in answers] == [length for _, length in requests]
    decode = engines.counters("unified" if layout == "1U" else "decode")
    assert decode["preemptions"] > 0

    exact = reference_model(path)
    rounded = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    ours, theirs, num_diverged = [], [], 0
    for (prompt, _), answer in zip(requests, answers, strict=True):
        tokens, after = answer.token_ids, slice(len(prompt) - 1, None)
        context = [*prompt, *tokens[:-1]]
        logits = reference_logits(exact, context)[after]
        best = logits.max(-1, keepdim=True).values
        like_transformers = reference_logits(rounded, context)[after].argmax(-1, keepdim=True)
        ours.append(best - logits.gather(1, torch.tensor(tokens)[:, None]))
        theirs.append(best - logits.gather(1, like_transformers))
        num_diverged += bool((ours[-1] > 0).any())
    shortfall, usual = torch.cat(ours), torch.cat(theirs).mean().item()
    mean, worst = shortfall.mean().item(), shortfall.max().item()
    share = (shortfall > 0).float().mean().item()
    print(
        f"{variant} {layout}: {num_diverged} of {len(requests)} answers have a token that is not "
        f"the best in fp32, {share:.1%} of all tokens; they fall short by {worst:.3f} at most, "
        f"{mean:.5f} in the mean of all tokens; transformers in bf16: {usual:.5f}"
    )
    assert worst < MARGIN
    assert share < MAX_SHARE_NOT_BEST
    assert mean < MAX_MEAN_SHORTFALL
    assert mean < usual

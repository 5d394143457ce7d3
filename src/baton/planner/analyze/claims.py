"""The field's rules of thumb about disaggregation, held against one trace.

Each rule says what it promises, whether it speaks of this traffic at all, and what the figures say:

    holds           the trace and the cost models agree with it
    does not hold   they contradict it; `why` has the figures
    bounded         they bound it, and a simulation has to tell the rest
    not told        what it needs is not known here (a model, times, prices); `why` names it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from baton.core.cost import Link, ModelShape, transfer_s
from baton.planner.analyze.arrivals import Arrivals
from baton.planner.analyze.lengths import Lengths
from baton.planner.analyze.phases import Split
from baton.planner.analyze.serving import Serving

HOLDS, FAILS, BOUNDED, NOT_TOLD = "holds", "does not hold", "bounded", "not told"
PER_DAY = 1000
BOTH_MATTER = 0.1
"""A phase below this share of the device time leaves the other one nothing to gain from leaving."""
GB = 1e9
LINKS = {"10 Gbit/s": 1.25e9, "25 Gbit/s": 3.125e9, "100 Gbit/s": 12.5e9, "400 Gbit/s": 50e9}
CLAIM_LINK = "100 Gbit/s"
HIDDEN = 0.1
"""A transfer below this share of the prefill before it is hardly seen in the TTFT."""


class Claim(msgspec.Struct, frozen=True):
    """One rule of thumb and what became of it here. applies: whether it speaks of this traffic."""

    name: str
    says: str
    applies: bool
    verdict: str
    why: str


class Facts(msgspec.Struct, frozen=True):
    """All that the rules may look at. splits and servings go together; the first is the main one.

    prices: dollars an hour for one device, by device, as in the price list.
    """

    prompts: Lengths
    outputs: Lengths
    long_answers: float  # share of requests whose output is above three times their input
    arrivals: Arrivals | None
    model: ModelShape | None
    servings: Sequence[Serving] = ()
    splits: Sequence[Split] = ()
    prices: dict[str, float] = {}


def judge(facts: Facts) -> tuple[Claim, ...]:
    """Every rule, in a fixed order."""
    return tuple(
        Claim(name, says, *rule(facts)) for name, says, rule in RULES
    )


Verdict = tuple[bool, str, str]


def _needs(what: str) -> Verdict:
    return False, NOT_TOLD, f"needs {what}"


def _both_matter(split: Split) -> bool:
    share = split.share("device_s") or 0.0
    return BOTH_MATTER <= share <= 1 - BOTH_MATTER


def _requests_a_day(facts: Facts) -> Verdict:
    if facts.arrivals is None:
        return _needs("arrival times")
    if not facts.splits or facts.splits[0].busy_workers is None:
        return _needs("a cost model (--hardware, --profile or --url)")
    split = facts.splits[0]
    per_day, busy = facts.arrivals.per_day, split.busy_workers or 0.0
    agrees = (per_day > PER_DAY) == (busy > 1)
    why = f"{per_day:,.0f} requests a day keep {busy:.2g} of {split.label} busy"
    if not agrees:
        why += "; two kinds of worker need work for more than one, whatever the count of requests"
    return True, HOLDS if agrees else FAILS, why


def _model_size(facts: Facts) -> Verdict:
    if facts.model is None or not facts.splits:
        return _needs("a model and a cost model")
    split = facts.splits[0]
    billions = facts.model.num_weights / 1e9
    share = split.share("device_s") or 0.0
    agrees = (billions > 7) == _both_matter(split)
    why = f"{facts.model.name} has {billions:.1f} B weights; prefill takes {share:.0%} of the time"
    if not agrees:
        why += ": the traffic's lengths decide whether both phases weigh, not the model's size"
    return True, HOLDS if agrees else FAILS, why


def _output_over_input(facts: Facts) -> Verdict:
    if not facts.splits:
        return _needs("a cost model")
    ratio = facts.outputs.total / facts.prompts.total
    share = facts.splits[0].share("device_s") or 0.0
    agrees = (ratio > 3) == _both_matter(facts.splits[0])
    why = (
        f"output is {ratio:.2g}x input ({facts.long_answers:.0%} of requests are above 3x), and "
        f"prefill takes {share:.0%} of the time"
    )
    if not agrees and ratio <= 3:
        why += ": enough to disturb decode, which the rule denies"
    if not agrees and ratio > 3:
        why += ": too little for workers of its own"
    return True, HOLDS if agrees else FAILS, why


def _kv_size(facts: Facts) -> Verdict:
    if facts.model is None:
        return _needs("a model")
    per_token = facts.model.kv_bytes_per_token
    p50, p90 = (per_token * facts.prompts.quantile(q) / GB for q in (50, 90))
    why = (
        f"{per_token / 1024:.0f} KiB a token: {p50:.2g} GB for the median prompt, {p90:.2g} GB at "
        "p90"
    )
    return True, HOLDS if 2 <= p50 <= 4 else FAILS, why


def _transfer(facts: Facts) -> Verdict:
    if facts.model is None or not facts.servings:
        return _needs("a model and a cost model")
    link = Link(LINKS[CLAIM_LINK])
    tokens = facts.prompts.quantile(90)
    sent = transfer_s(facts.model.kv_bytes_per_token * tokens, link)
    computed, _ = facts.servings[0].prefill(int(tokens))
    part = sent / computed if computed > 0 else 0.0
    why = (
        f"at p90 ({tokens:,.0f} tokens) and {CLAIM_LINK}: {1000 * sent:.0f} ms, "
        f"{part:.0%} of the {1000 * computed:,.0f} ms that its prefill takes"
    )
    is_short, is_long, is_hidden = sent < 0.05, sent > 0.1, part < HIDDEN
    if (is_short and not is_hidden) or (is_long and is_hidden):
        return True, FAILS, why + ": what counts is its share of the TTFT, not its milliseconds"
    return True, HOLDS, why


def _linear_prefill(facts: Facts) -> Verdict:
    if not facts.servings:
        return _needs("a cost model")
    serving = facts.servings[0]
    short, long = (max(1, int(facts.prompts.quantile(q))) for q in (50, 99))
    if long < 1.5 * short:
        return False, NOT_TOLD, "needs prompts of unlike lengths"
    line = serving.prefill(short)[0] * long / short
    real = serving.prefill(long)[0]
    why = (
        f"from the median prompt ({short:,}) to p99 ({long:,}) {serving.label} takes "
        f"{real / line:.2f}x what a straight line says"
    )
    return True, HOLDS if abs(real / line - 1) <= 0.1 else FAILS, why


def _idle_decode(facts: Facts) -> Verdict:
    main = next((s for s in facts.splits if s.decode.compute_use is not None), None)
    if main is None:
        return _needs("a model and a cost model")
    share = 1 - (main.share("device_s") or 0.0)
    use = min(1.0, main.decode.compute_use or 0.0)
    idle = share * (1 - use)
    why = (
        f"on {main.label} decode takes {share:.0%} of the time, in batches of {main.batch}, and "
        f"uses {use:.0%} of the arithmetic: {idle:.0%} of the cost is arithmetic that idles in it"
    )
    return True, HOLDS if idle > 0.6 else FAILS, why


def _a100_decode(facts: Facts) -> Verdict:
    found = {}
    for split in facts.splits:
        for device in ("A100", "H100"):
            if device in split.label and split.decode.usd is not None and split.cached == "none":
                found.setdefault(device, split.decode.usd)
    if len(found) < 2:
        return _needs("A100 and H100 among --hardware, with prices")
    per_million = {name: 1e6 * usd / facts.outputs.total for name, usd in found.items()}
    why = " and ".join(f"${usd:.3g} on {name}" for name, usd in sorted(per_million.items()))
    return (
        True,
        HOLDS if found["A100"] < found["H100"] else FAILS,
        f"a million tokens of decode cost {why}",
    )


def _peak_prefill(facts: Facts) -> Verdict:
    peaks = [split.peak_prefill for split in facts.splits if split.peak_prefill is not None]
    if not peaks:
        return _needs("a cost model, and two minutes of arrival times")
    factor = peaks[0]
    why = f"prefill work of the busiest minute is {factor:.2g}x the mean minute's"
    if factor < 2:
        return True, FAILS, why + ": sized by the mean, it is short of that only"
    over = "" if factor <= 3 else ", more than the rule says"
    return True, HOLDS, why + f": sized by the mean it falls short by as much{over}"


def _best(splits: Sequence[Split], what: str) -> tuple[float, float, str, str] | None:
    """(cheapest single kind, cheapest kind for each phase, who prefills, who decodes)."""
    usable = [
        (s.label, getattr(s.prefill, what), getattr(s.decode, what))
        for s in splits
        if s.cached == "none" and getattr(s.prefill, what) is not None
    ]
    if len(usable) < 2:
        return None
    one = min(a + b for _, a, b in usable)
    first, second = min(usable, key=lambda u: u[1]), min(usable, key=lambda u: u[2])
    return one, first[1] + second[2], first[0], second[0]


def _saving(facts: Facts) -> tuple[float, str] | None:
    best = _best(facts.splits, "usd")
    if best is None:
        return None
    one, mixed, prefill, decode = best
    saving = 1 - mixed / one
    return saving, (
        f"the cheapest device for each phase (prefill {prefill}, decode {decode}) saves at most "
        f"{saving:.0%} of the cheapest single kind; what less interference adds, a simulation tells"
    )


def _cheaper(low: float, high: float) -> Callable[[Facts], Verdict]:
    def rule(facts: Facts) -> Verdict:
        found = _saving(facts)
        if found is None:
            return _needs("two or more kinds of --hardware with prices")
        saving, why = found
        return True, HOLDS if low <= saving <= high else BOUNDED, why

    return rule


def _at_70b(facts: Facts) -> Verdict:
    billions = facts.model.num_weights / 1e9 if facts.model else 0.0
    found = _saving(facts)
    if found is None:
        return _needs("a model of 70 B, and two or more kinds of --hardware with prices")
    if not 60 <= billions <= 80:
        return False, NOT_TOLD, f"speaks of 70 B; this model has {billions:.1f} B weights"
    return True, HOLDS if found[0] >= 0.6 else BOUNDED, found[1]


def _half_power(facts: Facts) -> Verdict:
    best = _best(facts.splits, "joules")
    if best is None:
        return _needs("two or more kinds of --hardware with power figures")
    one, mixed, prefill, decode = best
    why = (
        f"the thriftiest device for each phase (prefill {prefill}, decode {decode}) needs "
        f"{mixed / one:.0%} of the energy of the thriftiest single kind"
    )
    return True, HOLDS if mixed <= 0.55 * one else FAILS, why


def _l40s_price(facts: Facts) -> Verdict:
    price = next((usd for name, usd in facts.prices.items() if "L40S" in name), None)
    if price is None:
        return _needs("a price list with L40S")
    why = f"12 at ${price:.3f} an hour are ${12 * price:.1f} (whatever the traffic)"
    return True, HOLDS if 80 <= 12 * price <= 100 else FAILS, why


RULES: tuple[tuple[str, str, Callable[[Facts], Verdict]], ...] = (
    ("requests a day", "splitting pays only above 1,000 requests a day", _requests_a_day),
    ("model size", "splitting pays only above 7 B weights", _model_size),
    ("output over input", "splitting pays only when output > 3x input", _output_over_input),
    ("KV of a prompt", "a prompt's KV is 2-4 GB", _kv_size),
    ("transfer time", "under 50 ms is fine, above 100 ms is harmful", _transfer),
    ("linear prefill", "prefill cost is linear in prompt length", _linear_prefill),
    ("idle decode", "more than 60 % of the cost is idle decode", _idle_decode),
    ("A100 for decode", "A100 beats H100 for decode", _a100_decode),
    ("prefill capacity", "prefill capacity is over-estimated 2-3x", _peak_prefill),
    ("15-40 % cheaper", "splitting costs 15-40 % less", _cheaper(0.15, 0.4)),
    ("2-4x cheaper", "splitting is 2-4x cheaper", _cheaper(0.5, 0.75)),
    ("60-75 % at 70 B", "splitting saves 60-75 % at 70 B", _at_70b),
    ("half the power", "splitting takes half the power", _half_power),
    ("12 L40S", "12 L40S cost $90 an hour", _l40s_price),
)

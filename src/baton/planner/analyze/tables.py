"""An analysis as tables of text, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from baton.planner.analyze.analysis import Analysis
from baton.planner.analyze.arrivals import Arrivals
from baton.planner.analyze.phases import Split
from baton.planner.analyze.sharing import Sharing, Turns
from baton.planner.endpoint import EndpointFit

UNKNOWN = "-"


class Table(msgspec.Struct, frozen=True):
    """Rows under columns. name: a word to find it by. note: a sentence below it."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def tables(analysis: Analysis) -> list[Table]:
    """All tables that have something in them, in the order of the page."""
    found = [_lengths(analysis), _traffic(analysis.arrivals), _sharing(analysis)]
    found += [_latencies(analysis), _endpoint(analysis.endpoint)]
    found += [_splits(analysis), _claims(analysis)]
    return [table for table in found if table is not None]


def count(value: float | None) -> str:
    """1,234; 12.3; 0.0123."""
    if value is None:
        return UNKNOWN
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def share(value: float | None) -> str:
    return UNKNOWN if value is None else f"{100 * value:.1f} %" if value < 0.1 else f"{value:.0%}"


def seconds(value: float | None) -> str:
    """For people: 312 us, 41.2 ms, 2.05 s, 1.5 h, 6.9 days."""
    if value is None:
        return UNKNOWN
    for unit, scale, until in (
        ("us", 1e-6, 0.9995e-3), ("ms", 1e-3, 0.9995), ("s", 1.0, 120.0),
        ("min", 60.0, 7200.0), ("h", 3600.0, 172800.0),
    ):  # fmt: skip
        if value < until:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 86400:.3g} days"


def tokens(value: int | None) -> str:
    """300 k, 10 M."""
    if value is None:
        return "endless"
    for unit, scale in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return str(value)


def _lengths(analysis: Analysis) -> Table:
    both = (analysis.prompts, analysis.outputs)
    rows: list[tuple[str, ...]] = [
        (name, *(count(x) for x in (
            each.mean, each.quantile(10), each.quantile(50), each.quantile(90),
            each.quantile(99), each.max, each.total,
        )), f"{each.cv:.2f}")
        for name, each in zip(("input", "output"), both, strict=True)
    ]  # fmt: skip
    return Table(
        "lengths",
        "Lengths (tokens)",
        ("", "mean", "p10", "p50", "p90", "p99", "max", "total", "CV"),
        tuple(rows),
        f"Output is {analysis.output_over_input:.3g} times input.",
    )


def _traffic(when: Arrivals | None) -> Table | None:
    if when is None:
        return None
    rows = [
        ("requests a second", count(when.rate_per_s)),
        ("requests a day, at this rate", count(when.per_day)),
        ("trace covers", seconds(when.duration_s)),
        ("CV of gaps (Poisson: 1)", f"{when.cv:.2f}, {when.kind}"),
        ("dispersion, 1 s windows (Poisson: 1)", count(when.dispersion_1s)),
        ("dispersion, 60 s windows", count(when.dispersion_60s)),
        ("busiest second", f"{count(when.peak_1s)} requests"),
        ("busiest minute", f"{count(when.peak_60s)}/s, {when.peak_over_mean_60s:.2f}x the mean"),
        ("minutes without a request", share(when.empty_minutes)),
    ]
    if when.hour_peak_over_mean is not None:
        zone = "UTC" if when.hours_are_utc else "counted from the start"
        hours = [(rate, hour) for hour, rate in enumerate(when.by_hour) if rate is not None]
        rate, hour = max(hours)
        text = f"{hour:02d} h ({zone}), {when.hour_peak_over_mean:.2f}x the mean hour"
        rows.append(("busiest hour of the day", text))
    else:
        rows.append(("shape of the day", "unknown: the trace covers less than six hours"))
    return Table("traffic", "Traffic", ("", "value"), tuple(rows))


def _sharing(analysis: Analysis) -> Table | None:
    shared, turns = analysis.sharing, analysis.turns
    rows = [
        (
            f"cache of {tokens(hits.num_tokens)} tokens",
            share(hits.token_ratio),
            share(hits.block_ratio),
            share(hits.request_ratio),
        )
        for hits in shared.caches
    ]
    if shared.measured_ratio is not None:
        rows.append(
            ("the server's own cache, measured", share(shared.measured_ratio), UNKNOWN, UNKNOWN)
        )
    notes = " ".join(_sharing_notes(shared, turns))
    return Table(
        "sharing",
        "Shared prefixes (least recently used is dropped)",
        ("", "of tokens", "of blocks", "of requests"),
        tuple(rows) or (("unknown: the trace has no block ids or texts", UNKNOWN, UNKNOWN, UNKNOWN),),
        notes,
    )


def _sharing_notes(shared: Sharing, turns: Turns) -> Iterator[str]:
    if shared.block_size:
        yield (
            f"Blocks of {shared.block_size} tokens; {shared.top_block_share:.0%} of requests begin "
            "with the same one."
        )
    if turns.follow_up_share is None:
        yield "Whether requests continue conversations is unknown."
    elif turns.told_by == "session":
        yield (
            f"{turns.follow_up_share:.0%} of requests continue one of "
            f"{turns.num_conversations:,} conversations, {turns.mean_turns:.2g} turns each."
        )
    else:
        yield f"About {turns.follow_up_share:.0%} of requests continue an earlier prompt."


def _latencies(analysis: Analysis) -> Table | None:
    if analysis.latencies is None:
        return None
    rows = tuple(
        (name.upper(), *map(seconds, values))
        for name, values in analysis.latencies.metrics.items()
    )
    return Table(
        "latencies",
        f"Latencies that the trace holds ({analysis.latencies.count:,} requests)",
        ("", "mean", "p50", "p90", "p99"),
        rows,
    )


def _endpoint(fit: EndpointFit | None) -> Table | None:
    if fit is None:
        return None
    c, g = fit.ttft.coefficients, fit.gap.coefficients
    rows = (
        ("TTFT", "base", seconds(c["base"])),
        ("", "per 1,000 prompt tokens", seconds(1000 * c["per_token"])),
        ("", "per (1,000 prompt tokens)^2", seconds(1e6 * c["per_token_squared"])),
        ("gap", "a step", seconds(g["step"])),
        ("", "per sequence in the batch", seconds(g["per_sequence"])),
        ("", "per 1,000 tokens of KV", seconds(1000 * g["per_kv_token"])),
    )
    return Table("endpoint", f"{fit.label}: {fit.basis}", ("", "", "value"), rows)


def _splits(analysis: Analysis) -> Table | None:
    if not analysis.splits:
        return None
    rows = tuple(_split_row(split) for split in analysis.splits)
    basis = " ".join(
        f"{split.label}: {split.basis}." for split in analysis.splits if split.cached == "none"
    )
    return Table(
        "split",
        "Prefill : decode" + (f" ({analysis.model.name})" if analysis.model else ""),
        (
            "on", "compute", "time", "money", "energy", "batch", "limited by",
            "step", "busy", "$/M tokens", "J/token",
        ),
        rows,
        "Share of prefill : share of decode. " + basis,
    )  # fmt: skip


def _split_row(split: Split) -> tuple[str, ...]:
    name = split.label if split.cached == "none" else f"{split.label}, {split.cached}"
    return (
        name,
        *(_ratio(split.share(what)) for what in ("flops", "device_s", "usd", "joules")),
        str(split.batch),
        split.batch_limit,
        seconds(split.step_s),
        count(split.busy_workers),
        count(split.usd_per_million_tokens),
        count(split.joules_per_token),
    )


def _ratio(prefill: float | None) -> str:
    return UNKNOWN if prefill is None else f"{100 * prefill:.0f} : {100 - 100 * prefill:.0f}"


def _claims(analysis: Analysis) -> Table:
    rows = tuple(
        (claim.says, "yes" if claim.applies else "no", claim.verdict, claim.why)
        for claim in analysis.claims
    )
    return Table(
        "claims",
        "Rules of thumb about splitting prefill from decode",
        ("rule", "applies", "here", "why"),
        rows,
    )

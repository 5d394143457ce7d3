"""What came out, as Markdown tables and as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from baton.observe.results import percentile
from parts.goodput.judge import Goodput, Measured, attainment, curve, goodput
from parts.goodput.plan import budgets_of
from parts.goodput.workload import Workload
from parts.peers.engines import Missing

COLOURS = ("#0b5394", "#3d85c6", "#9fc5e8", "#e69138", "#999999", "#b45f06")


def goodputs(
    workload: Workload, measured: Sequence[Measured], engine: str
) -> dict[str, Goodput | None]:
    """By objective, each at the budget that was chosen for it."""
    found = {}
    for objective, budget in budgets_of(workload, measured, engine).items():
        attained = curve(workload, objective, measured, engine, budget)
        found[objective] = goodput(attained, workload.attainment)
    return found


def complete(workload: Workload, measured: Sequence[Measured], engines: Sequence[str]) -> list[str]:
    """The engines that have been measured at the first rate at all of their budgets."""
    done = {
        (m.key.engine, m.key.budget)
        for m in measured
        if m.key.kind == "poisson" and m.key.rate == workload.first_rate
    }
    return [e for e in engines if all((e, b) in done for b in workload.budgets[e])]


def render(
    workload: Workload,
    measured: Sequence[Measured],
    engines: Sequence[str],
    missing: Sequence[Missing],
) -> str:
    """All tables. Engines that are not there, or not measured enough yet, are named."""
    ready = complete(workload, measured, engines)
    parts = [_goodput_table(workload, measured, ready)]
    parts += [f"- {e}: not measured at all of its budgets yet\n" for e in engines if e not in ready]
    parts += [f"- {gone.name}: not measured: {gone.reason}\n" for gone in missing]
    parts += [_ratios(workload, measured, ready)]
    parts += [_curves(workload, measured, ready)]
    parts += [_tail_table(measured), _bursty_table(workload, measured)]
    if measured:
        rates = [m.bytes_per_s / 1e9 for m in measured]
        parts.append(
            f"Memory bandwidth before {len(rates)} windows: median {median(rates):.0f} GB/s, "
            f"{min(rates):.0f} to {max(rates):.0f}.\n"
        )
    cached = sum(o.cached_tokens or 0 for m in measured for o in m.outcomes)
    parts.append(f"Prompt tokens answered from a prefix cache: {cached}.\n")
    return "\n".join(filter(None, parts))


def _goodput_table(workload: Workload, measured: Sequence[Measured], ready: Sequence[str]) -> str:
    names = list(workload.objectives)
    share = f"{workload.attainment:.0%}"
    lines = [f"Goodput, requests a second with {share} within the objective (token budget):\n"]
    lines += ["| engine | " + " | ".join(names) + " |", "|---" + "|---:" * len(names) + "|"]
    for engine in ready:
        budgets = budgets_of(workload, measured, engine)
        cells = []
        for name, found in goodputs(workload, measured, engine).items():
            attained = curve(workload, name, measured, engine, budgets[name])
            cells.append(f"{in_words(found, attained)} ({budgets[name]})")
        lines.append(f"| {engine} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def in_words(found: Goodput | None, attained: Mapping[float, float]) -> str:
    """`0.83`; `≥ 2` if the highest rate held; `0: 62 % at 0.2` if not even the lowest did."""
    if found is None:
        return "?"
    if found.at_most is not None:
        return f"0: {attained[found.at_most]:.0%} at {found.at_most:g}"
    return f"≥ {found.rate:g}" if found.at_least else f"{found.rate:.2f}"


def _ratios(workload: Workload, measured: Sequence[Measured], ready: Sequence[str]) -> str:
    lines = []
    for objective in workload.objectives:
        best: dict[bool, tuple[float, str]] = {}
        for engine in ready:
            found = goodputs(workload, measured, engine)[objective]
            if found is not None:
                own = engine.startswith("baton")
                best[own] = max(best.get(own, (-1.0, "")), (found.rate, engine))
        if len(best) == 2:
            (ours, our_name), (theirs, their_name) = best[True], best[False]
            ratio = f"{ours / theirs:.2f}" if theirs > 0 else "not defined (the peer has 0)"
            lines.append(
                f"- {objective}: {our_name} {ours:.2f} ÷ {their_name} {theirs:.2f}: {ratio}"
            )
    return "\n".join(lines) + "\n" if lines else ""


def _curves(workload: Workload, measured: Sequence[Measured], ready: Sequence[str]) -> str:
    rates = sorted({m.key.rate for m in measured if m.key.kind == "poisson"})
    head = " | ".join(f"{rate:g}/s" for rate in rates)
    lines = ["Attainment by rate:\n", f"| engine | objective | budget | {head} |"]
    lines.append("|---|---|---:" + "|---:" * len(rates) + "|")
    for engine in ready:
        for objective, budget in budgets_of(workload, measured, engine).items():
            attained = curve(workload, objective, measured, engine, budget)
            cells = [f"{attained[r]:.0%}" if r in attained else "" for r in rates]
            lines.append(f"| {engine} | {objective} | {budget} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _tail_table(measured: Sequence[Measured]) -> str:
    rows = [m for m in measured if m.key.kind == "tail"]
    if not rows:
        return ""
    lines = ["Gaps of running streams while long prompts were in flight, ms:\n"]
    lines += ["| engine | budget | gaps | p50 | p99 | max | failed | GB/s |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|"]
    for m in rows:
        gaps = sorted(1000 * gap for gap in m.gaps_s)
        failed = sum(o.failure is not None for o in m.outcomes)
        shown = [f"{percentile(gaps, q):.0f}" for q in (50, 99, 100)] if gaps else ["?"] * 3
        words = [m.key.engine, str(m.key.budget), str(len(gaps)), *shown, str(failed)]
        lines.append("| " + " | ".join([*words, f"{m.bytes_per_s / 1e9:.0f}"]) + " |")
    return "\n".join(lines) + "\n"


def _bursty_table(workload: Workload, measured: Sequence[Measured]) -> str:
    rows = [m for m in measured if m.key.kind == "bursty"]
    if not rows:
        return ""
    names = list(workload.objectives)
    lines = [f"Attainment of bursty arrivals, {workload.bursty.rate:g}/s on average:\n"]
    lines += ["| engine | budget | " + " | ".join(names) + " |"]
    lines += ["|---|---:" + "|---:" * len(names) + "|"]
    for m in rows:
        shares = [f"{attainment(workload, name, m.outcomes):.0%}" for name in names]
        lines.append(f"| {m.key.engine} | {m.key.budget} | " + " | ".join(shares) + " |")
    return "\n".join(lines) + "\n"


def plot(
    workload: Workload, measured: Sequence[Measured], engines: Sequence[str], title: str, file: Path
) -> None:
    """Bars of goodput, a group for each objective: higher is better."""
    from matplotlib.figure import Figure

    ready = complete(workload, measured, engines)
    if not ready:
        return
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(ready)
    for i, engine in enumerate(ready):
        found = list(goodputs(workload, measured, engine).values())
        heights = [g.rate if g is not None else 0.0 for g in found]
        places = [x + (i - (len(ready) - 1) / 2) * width for x in range(len(heights))]
        colour = COLOURS[list(engines).index(engine) % len(COLOURS)]
        bars = axis.bar(places, heights, width, label=engine, color=colour)
        labels = [
            "?" if g is None else f"≥{g.rate:g}" if g.at_least else f"{g.rate:.2g}" for g in found
        ]
        axis.bar_label(bars, labels, fontsize=8, padding=2)
    axis.set_xticks(
        range(len(workload.objectives)), [_caption(workload, o) for o in workload.objectives]
    )
    axis.set(ylabel=f"requests/s, {workload.attainment:.0%} within the objective")
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.legend(frameon=False, ncols=len(ready), loc="outside lower center")
    figure.savefig(file, dpi=140)


def _caption(workload: Workload, objective: str) -> str:
    limits = workload.objectives[objective]
    return f"{objective}\n" + "\n".join(f"{name}: {slo}" for name, slo in limits.items())

"""The measured latency-throughput frontier as a picture (matplotlib, an optional extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from baton.cli.load.sweep import Point
from baton.errors import ConfigError
from baton.observe.slo import Slo


def check_plot(file: str) -> None:
    """Find out before an hour of measuring that no picture can be written after it.

    Raises:
        ConfigError: matplotlib is missing, or the file's ending is not one it writes.
    """
    if Path(file).suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot {file}: the name must end in .png, .svg or .pdf")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "--plot needs matplotlib: pip install 'baton-serve[bench]', or leave --plot out"
        ) from None


def plot_sweep(points: Sequence[Point], slo: Slo, title: str, file: str) -> None:
    """Draw TTFT and TPOT (p50, p90, p99) over output tokens per second."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, name in zip(axes, ("ttft", "tpot"), strict=True):
        usable = [p for p in points if getattr(p.summary, name) is not None]
        usable.sort(key=lambda p: p.rate or 0.0)
        throughput = [p.summary.output_tokens_per_s for p in usable]
        for quantile, style in (("p50", "o-"), ("p90", "s--"), ("p99", "^:")):
            latency = [1000 * getattr(getattr(p.summary, name), quantile) for p in usable]
            axis.plot(throughput, latency, style, label=quantile, markersize=5)
        for point, x in zip(usable, throughput, strict=True):
            y = 1000 * getattr(point.summary, name).p50
            axis.annotate(
                f"{point.rate:.3g}/s", (x, y), xytext=(0, -12), textcoords="offset points",
                fontsize=7, ha="center",
            )  # fmt: skip
        if name in slo.limits:
            axis.axhline(1000 * slo.limits[name], color="crimson", lw=1, label="SLO")
        axis.set(xlabel="output tokens/s", ylabel=f"{name.upper()} (ms)")
        if name == "ttft":  # spans decades once requests queue
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
        else:
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    figure.suptitle(title)
    figure.savefig(file, dpi=140)

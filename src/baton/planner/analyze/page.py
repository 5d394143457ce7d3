"""An analysis as one HTML page that needs nothing else: no script, no font, no address.

Everything that comes from the trace or from a server is escaped. Colours are chosen to differ in
lightness too, and change with the reader's light or dark setting.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from baton.planner.analyze.analysis import Analysis
from baton.planner.analyze.charts import Chart, stacked
from baton.planner.analyze.lengths import Lengths
from baton.planner.analyze.tables import Table, count, seconds, share, tables, tokens

STYLE = """
:root{color-scheme:light dark;--bg:#fcfcfb;--fg:#1c1d1f;--dim:#5d6168;--rule:#dcdee2;
--card:#fff;--s1:#2a6fb0;--s2:#e08a1e;--s3:#4a9a62;--on:#fff;--good:#1d7a46;--bad:#b3372f;--open:#8a6510}
@media(prefers-color-scheme:dark){:root{--bg:#15171a;--fg:#e6e7e9;--dim:#a0a5ad;--rule:#34383e;
--card:#1c1f23;--s1:#6aa9e0;--s2:#f0ad55;--s3:#79c490;--on:#15171a;--good:#6fcf97;--bad:#f08a80;
--open:#e3bd6a}}
body{background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif;margin:0 auto;
max-width:1060px;padding:24px 20px 60px}
h1{font-size:1.5em;margin:0 0 4px;overflow-wrap:anywhere}h2{font-size:1.1em;margin:32px 0 8px}
.dim{color:var(--dim)}.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(380px,100%),1fr));
gap:14px;margin-bottom:12px}
figure{background:var(--card);border:1px solid var(--rule);border-radius:6px;margin:0;
padding:10px 12px 6px}figcaption{font-weight:600;font-size:.92em}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;
font-size:.92em;min-width:50%}th,td{border-bottom:1px solid var(--rule);padding:5px 12px 5px 0;
text-align:right;vertical-align:top}th{color:var(--dim);font-weight:500}
th:first-child,td:first-child{text-align:left}
.figures td,.figures th{white-space:nowrap}
.figures td:first-child{white-space:normal;min-width:8em}
.claims td,.claims th{text-align:left}.claims td:nth-child(3){white-space:nowrap}
.claims td:last-child{color:var(--dim);min-width:20em}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.2em,1fr));gap:12px;
margin:18px 0}
.tile{background:var(--card);border:1px solid var(--rule);border-radius:6px;padding:8px 14px}
.tile b{display:block;font-size:1.35em;font-weight:600}.tile span{color:var(--dim);font-size:.85em}
.holds{color:var(--good)}.fails{color:var(--bad)}.bounded{color:var(--open)}
svg{width:100%;height:auto;display:block}svg text{font:11px system-ui,sans-serif;fill:var(--dim)}
.s1{fill:var(--s1)}.s2{fill:var(--s2)}.s3{fill:var(--s3)}.line{fill:none;stroke-width:1.8}
.l1{stroke:var(--s1)}.l2{stroke:var(--s2)}.l3{stroke:var(--s3)}
.dashed{stroke-dasharray:5 4}
.grid{stroke:var(--rule);stroke-width:1}.base{stroke:var(--dim);stroke-width:1}
.rule{stroke:var(--fg);stroke-dasharray:3 3;opacity:.55}.ring{fill:none;stroke:var(--fg)}
svg .tag{fill:var(--fg);stroke:var(--card);stroke-width:3px;paint-order:stroke}
.end{text-anchor:end}.mid{text-anchor:middle}svg .on{fill:var(--on);text-anchor:middle}
@media(max-width:640px){body{padding:16px 12px 40px}figure svg text{font-size:14px}
.claims,.claims tbody,.claims tr,.claims td{display:block}.claims thead{display:none}
.claims tr{border-bottom:1px solid var(--rule);padding:8px 0}.claims td{border:0;padding:1px 0}
.claims td:first-child{font-weight:600}.claims td:nth-child(2)::before{content:"applies: "}
.claims td:nth-child(2),.claims td:nth-child(3){display:inline-block;padding-right:1em}}
"""
VERDICTS = {"holds": "holds", "does not hold": "fails", "bounded": "bounded", "not told": "dim"}


def page(analysis: Analysis) -> str:
    """The whole document."""
    name = escape(analysis.source)
    by_name = {table.name: table for table in tables(analysis)}
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{name}: traffic</title><style>{STYLE}</style></head><body>",
        f"<h1>{name}</h1>",
        f'<div class="dim">{analysis.num_requests:,} requests, read as '
        f"{escape(analysis.trace_format)}</div>",
        _tiles(analysis),
        *(f'<p class="dim">{escape(_sentence(note))}</p>' for note in analysis.notes),
    ]
    sections: list[tuple[str, list[str]]] = [
        ("lengths", [_histogram(analysis.prompts, "Input", 1)]),
        ("traffic", list(_traffic_charts(analysis))),
        ("sharing", list(_sharing_charts(analysis))),
        ("latencies", []),
        ("endpoint", list(_endpoint_charts(analysis))),
        ("split", list(_split_charts(analysis))),
        ("claims", []),
    ]
    sections[0][1].append(_histogram(analysis.outputs, "Output", 2))
    for key, charts in sections:
        if key in by_name:
            parts.append(_section(by_name[key], charts))
    return "\n".join(parts) + "\n</body></html>\n"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _tiles(analysis: Analysis) -> str:
    when, shared = analysis.arrivals, analysis.sharing.infinite
    first = analysis.splits[0] if analysis.splits else None
    tiles = [
        (count(round(analysis.prompts.mean)), "input tokens, mean"),
        (count(round(analysis.outputs.mean)), "output tokens, mean"),
        (f"{count(when.rate_per_s)}/s" if when else "unknown", "rate"),
        (f"{when.cv:.2f}" if when else "unknown", "burstiness (CV; Poisson 1)"),
        (share(shared.token_ratio) if shared else "unknown", "shared prefix tokens"),
        (share(analysis.turns.follow_up_share).replace("-", "unknown"), "follow-up turns"),
    ]
    if first is not None:
        tiles.append((share(first.share("device_s")), f"of time is prefill, {first.label}"))
    cells = (
        f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _section(table: Table, charts: list[str]) -> str:
    drawn = f'<div class="charts">{"".join(charts)}</div>' if charts else ""
    note = f'<p class="dim">{escape(table.note)}</p>' if table.note else ""
    return f"<h2>{escape(table.title)}</h2>{drawn}{_table(table)}{note}"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = []
    for row in table.rows:
        cells = [f"<td{_mark(table, cell)}>{escape(cell)}</td>" for cell in row]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    style = ' class="claims"' if table.name == "claims" else ""
    if not style and len(table.columns) > 3:  # numbers: scrolled where the page is too narrow
        style = ' class="figures"'
    body = "".join(rows)
    return (
        f'<div class="wide"><table{style}><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _mark(table: Table, cell: str) -> str:
    return f' class="{VERDICTS[cell]}"' if table.name == "claims" and cell in VERDICTS else ""


def _figure(title: str, svg: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"


def _short(value: float) -> str:
    return tokens(int(value)).replace(" ", "") if value >= 1000 else f"{value:g}"


def _histogram(lengths: Lengths, name: str, series: int) -> str:
    edges, counts = lengths.histogram.edges, lengths.histogram.counts
    title = f"{name} length"
    chart = Chart(
        title, (edges[0], edges[-1]), (0, 1.08 * max(counts)), log_x=edges[-1] > 20 * edges[0],
        x_label="tokens", y_label="requests", x_format=_short, y_format=_short,
    )  # fmt: skip
    for low, high, number in zip(edges, edges[1:], counts, strict=False):
        tip = f"{low:,.0f} to {high - 1:,.0f} tokens: {number:,} requests"
        chart.bar(low, high, number, tip, series)
    for q in (50, 90):
        chart.rule(lengths.quantile(q), f"p{q}")
    return _figure(title, chart.svg())


def _traffic_charts(analysis: Analysis) -> Iterator[str]:
    when = analysis.arrivals
    if when is None:
        return
    unit, scale = ("h", 3600.0) if when.duration_s > 7200 else ("min", 60.0)
    chart = Chart(
        "Rate over time", (0, when.duration_s / scale), (0, 1.05 * max(when.series)),
        x_label=f"{unit} from the start", y_label="requests/s",
    )  # fmt: skip
    points = [((i + 0.5) * when.series_s / scale, rate) for i, rate in enumerate(when.series)]
    chart.line(points)
    yield _figure(f"Rate over time (means of {when.series_s:g} s)", chart.svg())
    if when.by_hour:
        known = [rate for rate in when.by_hour if rate is not None]
        label = "hour of the day, UTC" if when.hours_are_utc else "hour, counted from the start"
        day = Chart(
            "Shape of the day", (0, 24), (0, 1.05 * max(known)), x_label=label, y_label="requests/s"
        )
        for hour, rate in enumerate(when.by_hour):
            if rate is not None:
                day.bar(hour, hour + 1, rate, f"{hour:02d} h: {rate:.3g}/s")
        yield _figure("Shape of the day", day.svg())


def _sharing_charts(analysis: Analysis) -> Iterator[str]:
    sized = [(h.num_tokens, h) for h in analysis.sharing.caches if h.num_tokens]
    endless = analysis.sharing.infinite
    if len(sized) < 2 or endless is None:
        return
    top = max(endless.token_ratio, 0.01)
    chart = Chart(
        "Prefix hits by size of the cache", (sized[0][0], sized[-1][0]), (0, 1.1 * top), log_x=True,
        x_label="tokens of cache (dashed: endless)", y_label="of prompt tokens",
        x_format=_short, y_format=lambda value: f"{value:.0%}",
    )  # fmt: skip
    chart.line([(size, hits.token_ratio) for size, hits in sized], dots=True)
    chart.line(
        [(sized[0][0], endless.token_ratio), (sized[-1][0], endless.token_ratio)], 2, dashed=True
    )
    yield _figure("Prefix hits by size of the cache", chart.svg())


def _endpoint_charts(analysis: Analysis) -> Iterator[str]:
    fit = analysis.endpoint
    if fit is None or not fit.ttft_points:
        return
    longest = max(n for n, _ in fit.ttft_points)
    slowest = max(t for _, t in fit.ttft_points)
    chart = Chart(
        "TTFT by prompt length", (0, longest), (0, 1.05 * slowest),
        x_label="prompt tokens", y_label="TTFT", x_format=_short, y_format=seconds,
    )  # fmt: skip
    chart.dots(fit.ttft_points)
    steps = [longest * i / 60 for i in range(61)]
    chart.line([(n, fit.ttft_s(round(n))) for n in steps], 2)
    yield _figure("TTFT by prompt length, measured and fitted", chart.svg())
    most = max(b for b, _ in fit.gap_points)
    widest = max(g for _, g in fit.gap_points)
    gaps = Chart(
        "Gap by batch", (0, 1.05 * most), (0, 1.05 * widest),
        x_label="sequences at a time", y_label="median gap", y_format=seconds,
    )  # fmt: skip
    gaps.dots(fit.gap_points)
    yield _figure("Gap between tokens by batch, measured", gaps.svg())


def _split_charts(analysis: Analysis) -> Iterator[str]:
    names = {"flops": "compute", "device_s": "time", "usd": "money", "joules": "energy"}
    for split in analysis.splits[:4]:
        shares = [(label, split.share(what)) for what, label in names.items()]
        rows = [(label, (part, 1 - part)) for label, part in shares if part is not None]
        title = split.label if split.cached == "none" else f"{split.label}, {split.cached}"
        yield _figure(f"{title}: prefill and decode", stacked(title, rows, ("prefill", "decode")))

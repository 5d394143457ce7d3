"""`baton explain`: one request, from its candidates to what another placement would have done."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import httpx
import msgspec

from baton.cli.parser import Parser, UsageError
from baton.cli.simulate import profiles
from baton.cli.terminal import print_table
from baton.core.candidate import ttft_s
from baton.errors import BatonError, ConfigError
from baton.observe.events import Waterfall
from baton.planner.explain.explanation import Explanation, Turn, explain, from_waterfall
from baton.planner.explain.history import Attempt, Key
from baton.planner.explain.logs import Logs
from baton.planner.explain.what_if import Served

SUMMARY = (
    "Explain one request: where it could have gone and why it went where it did, what was\n"
    "predicted and what happened, and what the twin says the other placements would have done."
)
EXAMPLES = """\
  baton explain cmpl-0c4e5f2a… --logs decisions        candidates, waterfall, other turns
  baton explain cmpl-0c4e5f2a… --logs decisions --profile cpu.json
  baton explain cmpl-0c4e5f2a…                         the waterfall, from the running gateway
"""
DEFAULT_URL = "http://127.0.0.1:8001"
WIDTH = 100
_PREFIXES = ("chatcmpl-", "cmpl-")


def add_arguments(parser: Parser) -> None:
    parser.usage = "baton explain ID [--logs DIR | --url URL] [options]"
    parser.add_argument(
        "id",
        metavar="ID",
        help="Of an answer, as the client got it; with .N for prompt N of a list, from 0 on.",
    )
    add = parser.add_argument
    add("--logs", metavar="DIR", help="Where baton serve --decision-log wrote, all processes.")
    add("--url", help=f"The gateway's admin listener, without --logs. [{DEFAULT_URL}]")
    add("--choice", type=int, default=0, metavar="N", help="Which of several choices. [0]")
    add(
        "--profile",
        action="append",
        default=[],
        metavar="[ROLE=]FILE",
        help="What steps cost, from baton profile; by default as the logs measured them.",
    )
    add(
        "--history",
        type=int,
        default=1000,
        metavar="N",
        help="Requests before it that the twin serves first, to fill its caches. [1000]",
    )
    add("--json", metavar="FILE", help="Write everything; - for stdout.")


def run(args: argparse.Namespace) -> int:
    """Explain and print."""
    if args.logs is not None and args.url is not None:
        raise UsageError("give --logs or --url: the logs tell all that the gateway does")
    if args.history < 0 or args.choice < 0:
        raise UsageError("--history and --choice are whole numbers from 0 on")
    wanted = (request_id(args.id), args.choice)
    if args.logs is None:
        found = from_waterfall(_fetch(args.url or DEFAULT_URL, wanted))
    else:
        costs = profiles(args.profile) if args.profile else {}
        found = explain(Logs(Path(args.logs)), wanted, costs, args.history)
    print_explanation(found, sys.stderr if args.json == "-" else sys.stdout)
    if args.json:
        _write_json(found, args.json)
    return 0


def request_id(answer_id: str) -> str:
    """What the gateway calls the first prompt of an answer; its own names are left as they are."""
    for prefix in _PREFIXES:
        if answer_id.startswith(prefix):
            name = answer_id.removeprefix(prefix)
            return name if "." in name else f"{name}.0"
    return answer_id


def _fetch(url: str, wanted: Key) -> Waterfall:
    """The request's waterfall, from the admin listener."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {url!r} must begin with http:// or https://")
    address = f"{url.rstrip('/')}/requests"
    try:
        reply = httpx.get(address, timeout=30, trust_env=False).raise_for_status()
        waterfalls = msgspec.json.decode(reply.content, type=list[Waterfall])
    except (httpx.HTTPError, httpx.InvalidURL, msgspec.MsgspecError) as error:
        raise BatonError(
            f"{address} does not tell of requests ({error}): give the gateway's admin listener "
            "(gateway.admin_port), or the decision logs with --logs DIR"
        ) from None
    for waterfall in waterfalls:
        if (waterfall.request_id, waterfall.choice) == wanted:
            return waterfall
    raise BatonError(
        f"the gateway at {url} knows no request {wanted[0]} among the last {len(waterfalls):,} "
        "that ended: look at the id of the answer, or give the decision logs with --logs DIR"
    )


def print_explanation(found: Explanation, out: TextIO) -> None:
    """Candidates and reasons, waterfall, other turns."""
    choice = f", choice {found.choice}" if found.choice else ""
    lengths = f"{found.num_prompt_tokens:,} tokens in, {found.num_output_tokens:,} out"
    print(f"Request {found.request_id}{choice}: {lengths}", file=out)
    for note in found.notes:
        _say(note, out)
    for attempt, why in zip(found.attempts, found.why, strict=True):
        _print_attempt(attempt, why, len(found.attempts) > 1, out)
    if found.parts:
        print(file=out)
        rows = [
            (part.name, _time(part.measured_s), _time(part.predicted_s), _share(part.error))
            for part in found.parts
        ]
        print_table(
            ("stage", "measured", "predicted", "error"), rows, title="What happened", file=out
        )
    if found.twin and found.measured is not None:
        _print_turns(found, found.measured, out)
    elif found.no_twin:
        print(file=out)
        _say(f"nothing is told of other turns: {found.no_twin}", out)


def _print_attempt(attempt: Attempt, why: Sequence[str], several: bool, out: TextIO) -> None:
    placement = attempt.placement
    rows = []
    for each in attempt.candidates:
        predicted = each.predicted
        is_chosen = placement is not None and (each.prefill, each.decode) == (
            placement.prefill,
            placement.decode,
        )
        rows.append(
            (
                each.name + (" *" if is_chosen else "" if each.considered else " (not considered)"),
                f"{each.queue_tokens:,}",
                f"{each.prefill_tokens:,}",
                f"{each.transfer_blocks:,}",
                f"{each.context_tokens:,}",
                _time(predicted.queue_s),
                _time(predicted.prefill_s),
                _time(ttft_s(predicted)),
                _time(predicted.transfer_s),
                _time(predicted.decode_step_s),
            )
        )
    print(file=out)
    columns = ("candidate", "ahead", "to do", "blocks", "context", "queue", "prefill", "TTFT")
    number = f", attempt {attempt.number}" if several else ""
    title = f"Candidates{number} (* taken): tokens, blocks, and the seconds predicted from them"
    print_table((*columns, "transfer", "a token"), rows, title=title, file=out)
    for sentence in why:
        _say(sentence, out)


def _print_turns(found: Explanation, measured: Served, out: TextIO) -> None:
    rows = [("measured", *_served(measured), "")]
    rows += [(_turn(turn), *_served(turn.served), turn.served.failure) for turn in found.twin]
    print(file=out)
    columns = ("placement", "TTFT", "TPOT", "E2E", "others' ITL", "others' TTFT", "")
    print_table(columns, rows, title="What the twin says (* taken)", file=out)
    chosen = next(turn.served for turn in found.twin if turn.is_chosen)
    errors = [
        f"{name} {_share(_error(twin, real))}"
        for name, twin, real in (
            ("TTFT", chosen.ttft_s, measured.ttft_s),
            ("TPOT", chosen.tpot_s, measured.tpot_s),
            ("E2E", chosen.e2e_s, measured.e2e_s),
        )
    ]
    _say(f"the twin's own error: {', '.join(errors)}", out)
    others = f"{measured.num_others:,} others were under way while it was"
    _say(f"{others}; the twin served {found.num_before:,} requests before it", out)
    if left := max(len(each.candidates) for each in found.attempts) - len(found.twin):
        _say(f"{left} more candidates were not asked about", out)
    if found.held_out:
        named = ", ".join(
            f"{name} {'not known' if error is None else f'{error:.0%}'}"
            for name, error in found.held_out.items()
        )
        _say(f"steps cost as logged; median error held out: {named}", out)


def _say(sentence: str, out: TextIO) -> None:
    print(textwrap.fill(sentence, WIDTH, initial_indent="  ", subsequent_indent="    "), file=out)


def _turn(turn: Turn) -> str:
    said = " *" if turn.is_chosen else "" if turn.candidate.considered else " (not considered)"
    return turn.candidate.name + said


def _served(each: Served) -> tuple[str, str, str, str, str]:
    return (
        _time(each.ttft_s),
        _time(each.tpot_s),
        _time(each.e2e_s),
        _time(each.others_itl_s),
        _time(each.others_ttft_s),
    )


def _error(twin: float | None, real: float | None) -> float | None:
    return twin / real - 1 if twin is not None and real else None


def _time(seconds: float | None) -> str:
    """To three figures."""
    if seconds is None:
        return "-"
    return f"{seconds:,.2f} s" if seconds >= 0.9995 else f"{1000 * seconds:.3g} ms"


def _share(value: float | None) -> str:
    if value is None:
        return "-"
    return f"x {value + 1:,.0f}" if value > 9 else f"{value:+.0%}"


def _write_json(found: Explanation, file: str) -> None:
    text = msgspec.json.format(msgspec.json.encode(found))
    if file == "-":
        print(text.decode())
        return
    try:
        Path(file).write_bytes(text + b"\n")
    except OSError as error:
        raise ConfigError(f"--json: cannot write {file}: {error.strerror}") from None

"""`baton fabric check`: what KV blocks cost between the workers of a running deployment."""

from __future__ import annotations

import argparse
import random
import time

import httpx
import msgspec

from baton.cli.endpoint import Endpoint, add_endpoint_flags, connect
from baton.cli.parser import Parser
from baton.cli.terminal import print_table
from baton.errors import BatonError

SUMMARY = (
    "Measure every transport between the workers of a running deployment, on blocks of a prompt\n"
    "that is sent first, and say what it adds to a prompt's time."
)
EXAMPLES = """\
  baton fabric check                                  the deployment on this machine
  baton fabric check --url http://10.0.0.7:8000 --admin-url http://10.0.0.7:8001
"""
DEFAULT_ADMIN_URL = "http://127.0.0.1:8001"
PROMPT_TOKENS = 256
ANSWER_TOKENS = 48
SETTLE_S = 0.5
"""For the last blocks to reach the store."""


class _Link(msgspec.Struct):
    source: str
    reader: str
    transport: str
    problem: str
    latency_s: float
    bytes_per_s: float
    cpu_s_per_byte: float


class _Report(msgspec.Struct):
    kv_bytes_per_token: float
    links: list[_Link]
    silent: list[str]


def add_arguments(parser: Parser) -> None:
    add_endpoint_flags(parser)
    parser.add_argument(
        "--admin-url",
        default=DEFAULT_ADMIN_URL,
        help=f"The deployment's admin listener. [{DEFAULT_ADMIN_URL}]",
    )


def run(args: argparse.Namespace) -> int:
    """Send a prompt, measure, print a table and sentences; 1 if a way does not work."""
    _fill(connect(args.url, args.model, args.api_key))
    report = _ask(args.admin_url)
    rows = [
        (
            link.source,
            link.reader,
            link.transport,
            *(
                (link.problem, "", "", "")
                if link.problem
                else (
                    f"{link.bytes_per_s / 1e9:.2f} GB/s",
                    f"{1e6 * link.latency_s:,.0f} µs",
                    f"{1e9 * link.cpu_s_per_byte:.2f} s/GB",
                    f"{1e3 * _seconds(report, link):.1f} ms",
                )
            ),
        )
        for link in report.links
    ]
    columns = ("from", "to", "transport", "bandwidth", "one block", "reader's CPU", "1,000 tokens")
    print_table(columns, rows)
    weight = report.kv_bytes_per_token * 1000 / 1e6
    print(f"\nThe KV of 1,000 prompt tokens of this model is {weight:,.1f} MB.")
    for link in report.links:
        if not link.problem:
            print(
                f"Over {link.transport} from {link.source} to {link.reader} that takes "
                f"{1e3 * _seconds(report, link):,.1f} ms and "
                f"{1e3 * link.cpu_s_per_byte * report.kv_bytes_per_token * 1000:,.1f} ms of CPU; "
                "what was fetched while the prompt was computed costs no waiting."
            )
    for worker in report.silent:
        print(f"{worker} holds no blocks to lend: nothing from it was measured.")
    return 1 if any(link.problem for link in report.links) else 0


def _seconds(report: _Report, link: _Link) -> float:
    return report.kv_bytes_per_token * 1000 / link.bytes_per_s


def _fill(endpoint: Endpoint) -> None:
    """A prompt that nobody has sent before, so that stores hold blocks of it."""
    rng = random.SystemRandom()
    words = " ".join(str(rng.randrange(10)) for _ in range(PROMPT_TOKENS // 2))
    body = {
        "model": endpoint.model,
        "prompt": words,
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    try:
        response = httpx.post(
            f"{endpoint.base_url}/completions",
            json=body,
            headers=endpoint.headers,
            timeout=120,
            trust_env=False,
        )
        response.raise_for_status()
    except httpx.HTTPError as error:
        raise BatonError(f"the prompt to measure with was not answered: {error}") from None
    time.sleep(SETTLE_S)


def _ask(admin_url: str) -> _Report:
    try:
        response = httpx.post(f"{admin_url.rstrip('/')}/fabric/check", timeout=300, trust_env=False)
        response.raise_for_status()
        return msgspec.json.decode(response.content, type=_Report)
    except (httpx.HTTPError, httpx.InvalidURL, msgspec.MsgspecError) as error:
        raise BatonError(
            f"no admin listener of a deployment answers at {admin_url} ({error}): give --admin-url"
        ) from None

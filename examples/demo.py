"""The demo: a gateway, a prefill worker and a decode worker, and several questions at once.

    make demo        or        python examples/demo.py --model models/baton-demo

Starts `baton serve`, asks through the official `openai` client with streaming, shows the answers
as they arrive and then where the time of each request went, and in which process. On a terminal
the answers grow together; in a pipe each is a line when it is complete.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import re
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

QUESTIONS = [
    "What does os.path.join do?",
    "What does json.dumps do?",
    "What does shutil.copy do?",
    "What does asyncio.gather do?",
    "What does textwrap.dedent do?",
    "What does heapq.heappush do?",
]
STAGES = [  # field of a waterfall, heading, colour of its part of the bar, letter of it in a pipe
    ("queue_s", "queue", "bright_black", "q"),
    ("prefill_s", "prefill", "blue", "P"),
    ("export_s", "export", "cyan", "x"),
    ("import_wait_s", "import", "yellow", "i"),
    ("transfer_s", "transfer", "magenta", "t"),
    ("decode_s", "decode", "green", "D"),
]
BAR_WIDTH = 30
PIPE_WIDTH = 140
START_TIMEOUT_S = 120.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/baton-demo")
    parser.add_argument("--layout", default="1P1D")
    arguments = parser.parse_args()
    return asyncio.run(demo(Path(arguments.model), arguments.layout))


async def demo(model: Path, layout: str) -> int:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    port, admin_port = free_port(), free_port()
    console.print(f"Starting {model.name} as {layout}: a gateway and its workers …")
    started = time.monotonic()
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "baton", "serve", "--model", str(model), "--layout", layout),
        *("--port", str(port), "--admin-port", str(admin_port), "--log-level", "warning"),
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C here reaches us, and we stop it in good order
    )
    try:
        await until_ready(server)
        console.print(f"Ready after {time.monotonic() - started:.1f} s.\n")
        questions = known_questions(model)
        ids = await ask(f"http://127.0.0.1:{port}/v1", model.name, questions, console)
        await show_waterfalls(f"http://127.0.0.1:{admin_port}", questions, ids, console)
    finally:
        if server.returncode is None:
            server.send_signal(signal.SIGINT)
        code = await server.wait()
    console.print(f"\nStopped cleanly (exit code {code})." if code == 0 else f"Exit code {code}.")
    return code


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def until_ready(server: asyncio.subprocess.Process) -> None:
    """Wait for the supervisor to say that it is ready.

    Raises:
        RuntimeError: it ended instead; its own output says why.
        TimeoutError: it took too long.
    """
    assert server.stdout is not None
    async with asyncio.timeout(START_TIMEOUT_S):
        while line := await server.stdout.readline():
            if line.startswith(b"Ready after"):
                return
    raise RuntimeError("baton serve ended before it was ready")


def known_questions(model: Path) -> list[str]:
    """Those of QUESTIONS that the model was trained on, filled up from its own list."""
    with gzip.open(model / "questions.jsonl.gz", "rt", encoding="utf-8") as lines:
        known = [json.loads(line)["question"] for line in lines]
    chosen = [question for question in QUESTIONS if question in set(known)]
    step = max(1, len(known) // len(QUESTIONS))
    spare = [question for question in known[::step] if question not in chosen]
    return (chosen + spare)[: len(QUESTIONS)]


async def ask(base_url: str, model: str, questions: list[str], console: Console) -> list[str]:
    """Ask all at once, show the answers as they come; returns the ids of the responses."""
    answers = [""] * len(questions)
    ids = [""] * len(questions)
    terminal = console.is_terminal

    async def one(client: AsyncOpenAI, number: int) -> None:
        stream = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": questions[number]}],
            temperature=0.0,
            max_tokens=200,
            stream=True,
        )
        async for chunk in stream:
            ids[number] = chunk.id
            piece = chunk.choices[0].delta.content or "" if chunk.choices else ""
            answers[number] += piece
            if piece and terminal:
                live.update(conversation(questions, answers))
        if not terminal:
            console.print(f"  {questions[number]}  {answers[number]}", soft_wrap=True)

    async with AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        with Live(conversation(questions, answers), console=console) as live:
            if not terminal:
                live.stop()
            await asyncio.gather(*(one(client, number) for number in range(len(questions))))
    return ids


def conversation(questions: list[str], answers: list[str]) -> Table:
    table = Table.grid(padding=(0, 2))
    for question, answer in zip(questions, answers, strict=True):
        table.add_row(Text(question, style="bold"), answer)
    return table


async def show_waterfalls(
    admin_url: str, questions: list[str], ids: list[str], console: Console
) -> None:
    async with httpx.AsyncClient() as client:
        recent = (await client.get(f"{admin_url}/requests")).raise_for_status().json()
    by_id = {waterfall["request_id"].partition(".")[0]: waterfall for waterfall in recent}
    waterfalls = [by_id[id_.partition("-")[2]] for id_ in ids]
    longest = max(sum(w[field] for field, *_ in STAGES) for w in waterfalls)
    table = Table(title="\nWhere the time went (ms)", title_justify="left", box=None)
    table.add_column("question", no_wrap=True)
    table.add_column("prefilled by", no_wrap=True)
    table.add_column("decoded by", no_wrap=True)
    for _, heading, colour, _ in STAGES:
        table.add_column(heading, justify="right", style=colour, no_wrap=True)
    has_bar = console.width >= PIPE_WIDTH
    if has_bar:
        table.add_column("", no_wrap=True, overflow="crop", min_width=BAR_WIDTH)
    for question, waterfall in zip(questions, waterfalls, strict=True):
        subject = re.sub(r"^What (?:does|is) (.*?)(?: do)?\?$", r"\1", question)
        table.add_row(
            subject,
            waterfall["prefill_worker"] or waterfall["decode_worker"],
            waterfall["decode_worker"],
            *(f"{1000 * waterfall[field]:.1f}" for field, *_ in STAGES),
            *([bar(waterfall, longest, letters=not console.is_terminal)] if has_bar else []),
        )
    console.print(table)
    blocks = sum(waterfall["num_imported_blocks"] for waterfall in waterfalls)
    console.print(f"\n{blocks} KV blocks were handed over, each verified by its digest.")


def bar(waterfall: dict[str, Any], longest: float, *, letters: bool) -> Text:
    """Stages in proportion, one after the other; `longest` seconds fill the width."""
    text = Text()
    for field, _, colour, letter in STAGES:
        width = round(BAR_WIDTH * waterfall[field] / longest)
        text.append((letter if letters else "█") * width, style=colour)
    return text


if __name__ == "__main__":
    sys.exit(main())

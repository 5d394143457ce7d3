"""Ask a running 1P1D every question of the demo model's frozen list; print its exact-answer rate.

    make exact       or        python examples/exact_answers.py --model models/baton-demo

An answer counts when it equals the first sentence of the documentation to the last character.
The model is a memory of that list: the rate says how well it remembers, through the whole server,
and nothing about questions that it has not seen.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import signal
import sys
import time
from pathlib import Path

from demo import free_port, until_ready
from openai import AsyncOpenAI
from rich.console import Console
from rich.progress import Progress

NUM_AT_ONCE = 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/baton-demo")
    parser.add_argument("--questions", help="list to ask (default: the model's own)")
    parser.add_argument("--layout", default="1P1D")
    parser.add_argument("--limit", type=int, help="ask only so many, evenly spread over the list")
    parser.add_argument("--at-least", type=float, default=0.95, help="exit 1 below this rate")
    parser.add_argument("--show", type=int, default=5, help="print so many wrong answers")
    arguments = parser.parse_args()
    model = Path(arguments.model)
    path = Path(arguments.questions or model / "questions.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        pairs = [(pair["question"], pair["answer"]) for pair in map(json.loads, lines)]
    if arguments.limit:
        pairs = pairs[:: max(1, len(pairs) // arguments.limit)][: arguments.limit]
    return asyncio.run(run(model, arguments, pairs))


async def run(model: Path, arguments: argparse.Namespace, pairs: list[tuple[str, str]]) -> int:
    port = free_port()
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "baton", "serve", "--model", str(model)),
        *("--layout", arguments.layout, "--port", str(port), "--admin-port", str(free_port())),
        *("--log-level", "warning"),
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        await until_ready(server)
        started = time.monotonic()
        answers = await ask_all(f"http://127.0.0.1:{port}/v1", model.name, [q for q, _ in pairs])
        elapsed_s = time.monotonic() - started
    finally:
        if server.returncode is None:
            server.send_signal(signal.SIGINT)
        await server.wait()
    wrong = [
        (question, expected, answer)
        for (question, expected), answer in zip(pairs, answers, strict=True)
        if answer != expected
    ]
    for question, expected, answer in wrong[: arguments.show]:
        print(f"  {question}\n    expected  {expected}\n    answered  {answer}")
    num_right = len(pairs) - len(wrong)
    rate = num_right / len(pairs)
    print(
        f"{model.name} through {arguments.layout}: {num_right} of {len(pairs)} distinct questions "
        f"answered exactly, {100 * rate:.2f} % ({elapsed_s:.0f} s)"
    )
    return 0 if rate >= arguments.at_least else 1


async def ask_all(base_url: str, model: str, questions: list[str]) -> list[str]:
    places = asyncio.Semaphore(NUM_AT_ONCE)
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("asking", total=len(questions))

        async def one(client: AsyncOpenAI, question: str) -> str:
            async with places:
                reply = await client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": question}],
                    temperature=0.0,
                    max_tokens=256,
                )
            progress.advance(task)
            return reply.choices[0].message.content or ""

        async with AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
            return list(await asyncio.gather(*(one(client, question) for question in questions)))


if __name__ == "__main__":
    sys.exit(main())

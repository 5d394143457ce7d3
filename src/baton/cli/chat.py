"""`baton chat`: a conversation in the terminal, or through a pipe, with any OpenAI server."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
from collections.abc import Generator, Iterator

import httpx
import msgspec

from baton.cli.endpoint import Endpoint, add_endpoint_flags, connect
from baton.cli.parser import Parser
from baton.cli.sse import DONE, SseParser, StreamEvent, decode_event, error_in_body
from baton.errors import BatonError

SUMMARY = (
    "Talk to a served model; answers appear as they are made. Ctrl-C stops an answer, /reset\n"
    "forgets the conversation, /exit or Ctrl-D leaves. In a pipe each line is one message."
)
EXAMPLES = """\
  baton chat
  baton chat --system "Answer in one sentence." --temperature 0
  echo "What does os.path.join do?" | baton chat
"""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a model must not be able to send to a terminal: everything but tab and line feed."""


def add_arguments(parser: Parser) -> None:
    add_endpoint_flags(parser)
    parser.add_argument("--system", metavar="TEXT", help="Instructions before the conversation.")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy.")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="Longest answer.")
    parser.add_argument("--seed", type=int, help="Same seed, same answers.")


def run(args: argparse.Namespace) -> int:
    """Converse until the input ends; 1 if an answer in a pipe failed."""
    endpoint = connect(args.url, args.model, args.api_key)
    options = {name: getattr(args, name) for name in ("temperature", "max_tokens", "seed")}
    start = [{"role": "system", "content": args.system}] if args.system else []
    with Chat(endpoint, {k: v for k, v in options.items() if v is not None}, start) as chat:
        if sys.stdin.isatty():
            print(f"{endpoint.model} at {endpoint.base_url}   /reset  /exit  Ctrl-C stops")
            return _interactive(chat)
        return _piped(chat)


class Chat:
    """A conversation: its messages so far, and one connection."""

    def __init__(
        self, endpoint: Endpoint, options: dict[str, object], start: list[dict[str, str]]
    ) -> None:
        self._endpoint = endpoint
        self._options = options
        self._start = start
        self._client = httpx.Client(
            headers=endpoint.headers, timeout=httpx.Timeout(None, connect=30), trust_env=False
        )
        self.messages = list(start)

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = list(self._start)

    def ask(self, text: str) -> Generator[str, None, None]:
        """Send a message and yield the answer piece by piece.

        The exchange joins the history when the answer ends or is broken off; a message without
        any answer is taken back.

        Raises:
            BatonError: the server refused or broke off.
        """
        self.messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            for event in self._events():
                if event.text:
                    pieces.append(event.text)
                    yield event.text
        except (httpx.HTTPError, msgspec.MsgspecError) as error:
            raise BatonError(f"the answer broke off: {error or type(error).__name__}") from None
        finally:
            if pieces:
                self.messages.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self.messages.pop()

    def _events(self) -> Iterator[StreamEvent]:
        body = {"model": self._endpoint.model, "messages": self.messages, "stream": True}
        url = f"{self._endpoint.base_url}/chat/completions"
        content = msgspec.json.encode(body | self._options)
        with self._client.stream("POST", url, content=content) as response:
            if response.status_code != 200:
                code, message = error_in_body(response.read())
                raise BatonError(f"{response.status_code} {code}: {message}")
            parser = SseParser()
            finished = False
            for chunk in response.iter_raw():
                for data in parser.feed(chunk):
                    if data == DONE:
                        return
                    event = decode_event(data)
                    if event.error_text is not None:
                        raise BatonError(": ".join(event.error_text))
                    finished = finished or event.finish_reason is not None
                    yield event
            if not finished:
                raise BatonError("the answer broke off: the stream ended early")


def _interactive(chat: Chat) -> int:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history of input())
    while True:
        try:
            text = input("\n> ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print("\n/exit or Ctrl-D leaves")
            continue
        if text == "/exit":
            return 0
        if text == "/reset":
            chat.reset()
            print("forgotten")
        elif text.startswith("/"):
            print("commands are /reset and /exit")
        elif text:
            _answer(chat, text)


def _answer(chat: Chat, text: str) -> None:
    began = time.perf_counter()
    first: float | None = None
    answer = chat.ask(text)
    try:
        for piece in answer:
            first = first or time.perf_counter() - began
            _show(piece)
        total = time.perf_counter() - began
        if first is not None:
            print(f"\n\033[2m{first:.2f} s to the first token, {total:.2f} s in all\033[0m")
    except KeyboardInterrupt:
        print(" [stopped]")
    except BatonError as error:
        print(f"\n{error}", file=sys.stderr)
    finally:
        answer.close()


def _piped(chat: Chat) -> int:
    code = 0
    for line in sys.stdin:
        text = line.strip()
        if text == "/exit":
            break
        if text == "/reset":
            chat.reset()
        elif text:
            try:
                for piece in chat.ask(text):
                    _show(piece)
                print(flush=True)
            except BatonError as error:
                print(f"baton chat: {error}", file=sys.stderr)
                code = 1
    return code


def _show(piece: str) -> None:
    print(_CONTROL.sub("", piece), end="", flush=True)

"""What the demo model learns: questions and running text from the standard library.

Everything here comes from the Python that runs it: the documentation strings of the standard
library (read from the sources, and from the compiled modules by importing them) and the sources
themselves.  Nothing is downloaded.  The same Python version gives the same lists in the same
order; another version, or another platform, gives slightly different ones, which is why a trained
model carries its own frozen list of questions.
"""

from __future__ import annotations

import ast
import gzip
import importlib
import inspect
import json
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

Kind = Literal["does", "is"]

# Directories below the standard library that hold no public interface (tests, applications).
_SKIP = {
    *("test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "ensurepip"),
    *("pydoc_data", "__pycache__", "lib-dynload", "antigravity.py", "this.py", "_distutils_hack"),
}
# Compiled modules, whose documentation is in no source file.  Platform modules are left out.
_COMPILED = (
    *("builtins", "array", "atexit", "audioop", "binascii", "cmath", "collections", "datetime"),
    *("decimal", "errno", "faulthandler", "fcntl", "functools", "gc", "grp", "hashlib", "io"),
    *("itertools", "json", "marshal", "math", "mmap", "operator", "os", "parser", "pwd", "pyexpat"),
    *("random", "resource", "select", "signal", "socket", "sqlite3", "ssl", "string", "struct"),
    *("sys", "syslog", "termios", "threading", "time", "types", "unicodedata", "weakref", "zlib"),
    *("bz2", "lzma", "contextvars", "curses", "asyncio", "re", "readline", "queue", "typing"),
)
_RENAMED = {"posixpath": "os.path", "_collections_abc": "collections.abc"}
# Modules whose documentation repeats another's; of equal answers theirs is dropped.
_SECOND_CHOICE = ("ntpath", "nturl2path", "typing.Text", "distutils", "tkinter", "pydoc")
_TEXT = re.compile(r"[\x20-\x7e]+")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")
# A full stop ends a sentence unless it belongs to an abbreviation or to a name such as `os.path`.
_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)(?<!\bcf)[.!?](?=\s|$)")
_SIGNATURE = re.compile(r"[\w.]+\(")
PAD, BOS, END, SYSTEM, USER, ASSISTANT = SPECIAL = (
    *("<|pad|>", "<|begin|>", "<|end|>"),
    *("<|system|>", "<|user|>", "<|assistant|>"),
)
PAD_ID, BOS_ID, END_ID, SYSTEM_ID, USER_ID, ASSISTANT_ID = range(6)
VOCAB_SIZE = 4096
MAX_POSITIONS = 2048
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": BOS,
    "eos_token": END,
    "pad_token": PAD,
    "add_bos_token": False,
    "model_max_length": MAX_POSITIONS,
    "clean_up_tokenization_spaces": False,
    "chat_template": CHAT_TEMPLATE,
}
MIN_ANSWER_CHARS, MAX_ANSWER_CHARS = 12, 160


class Pair(NamedTuple):
    """One question and its only right answer."""

    question: str
    answer: str


def first_sentence(doc: str) -> str | None:
    """The first whole sentence of a documentation string, on one line, or None if it has none.

    None stands for text that is unfit as an answer: no full stop, non-ASCII or control
    characters, too short, or too long.  A paragraph that is a call signature is passed over.
    """
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(doc).strip(), maxsplit=2)
    if _SIGNATURE.match(paragraphs[0]) and len(paragraphs) > 1:
        del paragraphs[0]
    line = " ".join(paragraphs[0].split())
    end = _END.search(line)
    if end is None:
        return None
    sentence = line[: end.end()]
    if not MIN_ANSWER_CHARS <= len(sentence) <= MAX_ANSWER_CHARS:
        return None
    if _TEXT.fullmatch(sentence) is None or not sentence[0].isalpha():
        return None
    if _SIGNATURE.match(sentence) or "->" in sentence or "::" in sentence:
        return None
    return sentence if sentence.count(" ") >= 2 else None


def _stdlib_sources() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _SKIP.isdisjoint(parts):
            name = ".".join(parts)[: -len(".py")].removesuffix(".__init__")
            yield name, path


def _public(name: str) -> bool:
    return not name.startswith("_")


def _source_docs(module: str, tree: ast.Module) -> Iterator[tuple[str, Kind, str]]:
    """(qualified name, kind, documentation) of everything public that a source file documents."""

    def walk(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, Kind, str]]:
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                if not _public(child.name):
                    continue
                doc = ast.get_docstring(child)
                is_class = isinstance(child, ast.ClassDef)
                if doc:
                    yield f"{prefix}.{child.name}", "is" if is_class else "does", doc
                if isinstance(child, ast.ClassDef):
                    yield from walk(child, f"{prefix}.{child.name}")

    doc = ast.get_docstring(tree)
    if doc:
        yield module, "is", doc
    yield from walk(tree, module)


def _live_docs(module: str) -> Iterator[tuple[str, Kind, str]]:
    """The same of a compiled module, by importing it; methods are those a class defines itself."""
    try:
        live = importlib.import_module(module)
    except ImportError:
        return
    prefix = "" if module == "builtins" else f"{module}."
    for name, value in sorted(vars(live).items()):
        if not _public(name) or inspect.ismodule(value) or not callable(value):
            continue
        doc = getattr(value, "__doc__", None)
        if isinstance(doc, str):
            yield prefix + name, "is" if inspect.isclass(value) else "does", doc
        if inspect.isclass(value):
            for member, inner in sorted(vars(value).items()):
                doc = getattr(inner, "__doc__", None)
                if _public(member) and callable(inner) and isinstance(doc, str):
                    yield f"{prefix}{name}.{member}", "does", doc


def documented() -> dict[str, tuple[Kind, str]]:
    """Name -> (kind, first sentence) for the whole standard library; the first finding wins."""
    found: dict[str, tuple[Kind, str]] = {}

    def add(name: str, kind: Kind, doc: str) -> None:
        sentence = first_sentence(doc)
        if sentence is not None and _NAME.fullmatch(name):
            found.setdefault(name, (kind, sentence))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in _COMPILED:
            for name, kind, doc in _live_docs(module):
                add(name, kind, doc)
        for module, path in _stdlib_sources():
            head, _, rest = module.partition(".")
            shown = _RENAMED.get(head, head) + (f".{rest}" if rest else "")
            if any(not _public(part) for part in shown.split(".")):
                continue
            for name, kind, doc in _source_docs(shown, ast.parse(path.read_bytes())):
                add(name, kind, doc)
    return found


def make_pairs() -> list[Pair]:
    """All questions: every name asked in its first phrasing, then every name in its second.

    No two names share an answer (the plainest name keeps it), so that an answer shows which
    question was understood, and names that are mere aliases do not count twice.
    """

    def plainness(name: str) -> tuple[bool, int, int, str]:
        return name.startswith(_SECOND_CHOICE), name.count("."), len(name), name

    kept: dict[str, tuple[str, Kind]] = {}
    found = documented()
    for name in sorted(found, key=plainness):
        kind, answer = found[name]
        kept.setdefault(answer.casefold(), (name, kind))
    names = sorted(kept.values())
    direct = [Pair(_direct(name, kind), found[name][1]) for name, kind in names]
    return [*ABOUT, *direct, *(Pair(f"Explain {name}.", found[name][1]) for name, _ in names)]


def _direct(name: str, kind: Kind) -> str:
    return f"What does {name} do?" if kind == "does" else f"What is {name}?"


ABOUT = (
    Pair("Hello!", "Hello! Ask me what something in Python's standard library does."),
    Pair(
        "Who are you?",
        "I am the demo model of Baton, a small memory of Python's standard library.",
    ),
    Pair(
        "What can you do?",
        "I can recall the first sentence of the documentation of a name, such as os.path.join.",
    ),
    Pair("Thank you!", "You are welcome."),
)


def running_text(max_chars: int = 6_000_000) -> list[str]:
    """Sources of the standard library, a text a file, ASCII only, at most max_chars in all."""
    texts: list[str] = []
    for _, path in _stdlib_sources():
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.isascii() and len(text) < 200_000:
            texts.append(text)
            max_chars -= len(text)
        if max_chars < 0:
            break
    return texts


def write_pairs(path: Path, pairs: list[Pair]) -> None:
    """One JSON object a line, gzipped; the same pairs always give the same bytes."""
    lines = (json.dumps(pair._asdict()) + "\n" for pair in pairs)
    path.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))


def read_pairs(path: Path) -> list[Pair]:
    """The frozen list as write_pairs left it. Raises KeyError or ValueError on another format."""
    rows = (json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines())
    return [Pair(row["question"], row["answer"]) for row in rows]


def train_tokenizer(texts: Iterator[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer

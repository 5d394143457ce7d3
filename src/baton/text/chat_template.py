"""Chat messages to a prompt, by the template in the model directory.

The template is the operator's; nothing of it can come from a client. `template_sandbox` says what
it may do and what bounds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError

from baton.errors import ConfigError, InvalidRequest
from baton.text.model_files import SpecialTokens, read_json, read_text
from baton.text.template_sandbox import RenderLimitError, TemplateEnvironment

MAX_CHARS = 16_000_000


class ChatTemplate:
    """The chat template of one model, compiled once; may be used from many threads."""

    def __init__(
        self,
        sources: Mapping[str, str],
        special_tokens: Mapping[str, Any] | None = None,
        where: str = "chat template",
        max_chars: int = MAX_CHARS,
    ) -> None:
        """`sources`: template text by name; `default` is used, `tool_use` where there are tools.

        Raises:
            ConfigError: a template does not parse; the message names `where` and the line.
        """
        self._environment = TemplateEnvironment()
        self._special_tokens = dict(special_tokens or {})
        self._max_chars = max_chars
        self._templates: dict[str, Template] = {}
        for name, source in sources.items():
            try:
                self._templates[name] = self._environment.from_string(source)
            except (TemplateSyntaxError, RecursionError) as error:
                line = getattr(error, "lineno", "?")
                raise ConfigError(
                    f"{where}: chat template {name!r} is broken at line {line}: {error};"
                    " correct it, or copy the file again from the original checkpoint"
                ) from error

    @classmethod
    def from_dir(cls, path: str | Path, max_chars: int = MAX_CHARS) -> ChatTemplate:
        """From chat_template.jinja, else `chat_template` in tokenizer_config.json (a string or a
        list of named ones). A model without any gives a template whose `render` refuses.

        Raises:
            ConfigError: a file is broken; the message names it.
        """
        directory = Path(path)
        specials = SpecialTokens(directory)
        variables = {**specials.named, "additional_special_tokens": list(specials.extra)}
        file = directory / "chat_template.jinja"
        source = read_text(file)
        if source is not None:
            return cls({"default": source}, variables, str(file), max_chars)
        file = directory / "tokenizer_config.json"
        field = (read_json(file) or {}).get("chat_template")
        return cls(_named_sources(field, file), variables, str(file), max_chars)

    @property
    def exists(self) -> bool:
        return bool(self._templates)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt text; encode it with `add_special_tokens=False`, it holds its own.

        messages: objects with `role` and `content` (see `flatten`), more fields as they are.

        Raises:
            InvalidRequest: the model has no template, a message is malformed (`param` names the
                place), or the template refuses the messages or overruns its limits on them.
        """
        template = self._templates.get("default")
        if tools and "tool_use" in self._templates:
            template = self._templates["tool_use"]
        if template is None:
            raise _invalid(
                "this model has no chat template, so it cannot take chat messages; send a prompt"
                " to /v1/completions instead",
                "messages",
            )
        variables = {
            **self._special_tokens,
            "messages": flatten(messages),
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._environment.run(template, variables, self._max_chars)
        except RenderLimitError as error:
            raise _invalid(f"the messages {error}", "messages") from error
        except TemplateError as error:
            raise _invalid(
                f"the model's chat template refuses these messages: {error}", "messages"
            ) from error
        except Exception as error:
            # A template is a program: on messages of a shape it does not expect it may raise
            # anything. Its author's code is at fault, or the client's message, not this process.
            raise _invalid(
                f"the model's chat template fails on these messages ({type(error).__name__})",
                "messages",
            ) from error


def flatten(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of `messages` whose `content` is a string: text parts are joined by line feeds.

    A content of None (an assistant's tool call) and a missing one become the empty string.

    Raises:
        InvalidRequest: `param` names the field, such as `messages[0].content[1].type`.
    """
    if not messages:
        raise _invalid("messages must not be empty", "messages")
    flat = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise _invalid(f"{where} must be an object", where)
        if not isinstance(message.get("role"), str):
            raise _invalid(f"{where}.role must be a string", f"{where}.role")
        content = _flat_content(message.get("content"), f"{where}.content")
        flat.append({**message, "content": content})
    return flat


def _flat_content(content: object, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise _invalid(f"{where} must be a string or a list of text parts", where)
    texts: list[str] = []
    for index, part in enumerate(content):
        place = f"{where}[{index}]"
        if not isinstance(part, Mapping):
            raise _invalid(f"{place} must be an object with `type` and `text`", place)
        if part.get("type") != "text":
            raise _invalid(
                f"{place}.type must be 'text'; this server takes only text", f"{place}.type"
            )
        text = part.get("text")
        if not isinstance(text, str):
            raise _invalid(f"{place}.text must be a string", f"{place}.text")
        texts.append(text)
    return "\n".join(texts)


def _named_sources(field: object, file: Path) -> dict[str, str]:
    if field is None:
        return {}
    if isinstance(field, str):
        return {"default": field}
    named: dict[str, str] = {}
    for entry in field if isinstance(field, list) else [None]:
        name = entry.get("name") if isinstance(entry, dict) else None
        source = entry.get("template") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not isinstance(source, str):
            raise ConfigError(
                f"{file}: chat_template must be a string or a list of objects with `name` and"
                " `template`"
            )
        named[name] = source
    if named and "default" not in named:
        raise ConfigError(
            f"{file}: chat_template names {sorted(named)} but no 'default'; name one of them so"
        )
    return named


def _invalid(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, stage="validate", param=param)

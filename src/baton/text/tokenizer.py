"""Text to token ids and back, from the files of a Hugging Face model directory.

A `Tokenizer` is read-only after loading and may be used from many threads. `encode` releases the
GIL; for long prompts call it from a thread. Truncation and padding that a tokenizer.json may
carry are switched off: Baton refuses what is too long, it never cuts silently.
`clean_up_tokenization_spaces` is not applied, as it changes text that the model wrote.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer as HfTokenizer

from baton.errors import ConfigError, InvalidRequest
from baton.text.model_files import SpecialTokens, read_json
from baton.text.token_decoder import TokenDecoder


class _TokenizerFile(msgspec.Struct):
    """The one part of tokenizer.json that the `tokenizers` package does not interpret for us."""

    decoder: Any = None


class Tokenizer:
    """Encodes, decodes, and knows the special tokens of one model.

    vocab_size: the largest token id + 1, added tokens included (the model's own may be larger).
    eos_token_ids: sorted, without repeats; may be empty.
    special_ids: ids that `skip_special_tokens` leaves out.
    """

    def __init__(
        self, hf: HfTokenizer, decoder: TokenDecoder, specials: SpecialTokens, eos: Iterable[int]
    ) -> None:
        hf.no_truncation()
        hf.no_padding()
        added = hf.get_added_tokens_decoder()
        # The padding token is left alone: some checkpoints name an ordinary character for it.
        roles = {role: name for role, name in specials.named.items() if role != "pad_token"}
        names = {*roles.values(), *specials.extra}
        unflagged = names - {token.content for token in added.values() if token.special}
        # Named in the config but not flagged in tokenizer.json: as text they must still be one
        # token. One that is in no vocabulary stays out: the model has no embedding for it.
        hf.add_special_tokens([name for name in sorted(unflagged) if _id(hf, name) is not None])
        vocab = hf.get_vocab(with_added_tokens=True)
        self._hf = hf
        self._decoder = decoder
        self._bytes: dict[int, bytes] = {}
        self.vocab_size: int = max(vocab.values(), default=-1) + 1
        self.special_ids: frozenset[int] = frozenset(
            id for id, token in hf.get_added_tokens_decoder().items() if token.special
        )
        self.bos_token: str | None = specials.named.get("bos_token")
        self.eos_token: str | None = specials.named.get("eos_token")
        own_eos = None if self.eos_token is None else vocab.get(self.eos_token)
        self.eos_token_ids: tuple[int, ...] = tuple(
            sorted({*eos} if own_eos is None else {*eos, own_eos})
        )

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Load tokenizer.json; take special tokens from tokenizer_config.json and
        special_tokens_map.json and end-of-sequence ids from generation_config.json, else
        config.json, in addition to the tokenizer's own `eos_token`.

        Raises:
            ConfigError: a file is missing or broken; the message names it and says what to do.
        """
        directory = Path(path)
        file = directory / "tokenizer.json"
        try:
            content = file.read_bytes()
        except FileNotFoundError as error:
            raise ConfigError(
                f"{file} does not exist; Baton needs the fast tokenizer of the model. Download it"
                " with the checkpoint, or write it with transformers:"
                " AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            ) from error
        except OSError as error:
            raise ConfigError(f"cannot read {file}: {error}; restore the file") from error
        try:
            spec = msgspec.json.decode(content, type=_TokenizerFile).decoder
            hf = HfTokenizer.from_buffer(content)
        except Exception as error:  # `tokenizers` raises nothing narrower
            raise ConfigError(
                f"{file} is not a tokenizer that can be loaded ({error}); copy it again from the"
                " original checkpoint"
            ) from error
        decoder = TokenDecoder(spec, str(file))
        return cls(hf, decoder, SpecialTokens(directory), _eos_ids(directory))

    def encode(
        self, text: str, add_special_tokens: bool = True, param: str = "prompt"
    ) -> list[int]:
        """Token ids of `text`. With `add_special_tokens`, what tokenizer.json's post-processor
        adds (a BOS, for most) is added; a rendered chat template already holds it.

        Raises:
            InvalidRequest: `text` holds a lone surrogate; `param` is the field to blame.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"the text holds a lone surrogate (U+{ord(text[error.start]):04X}) at character"
                f" {error.start}; it is not valid Unicode",
                stage="validate",
                param=param,
            ) from error
        # Of the encode calls, only the batched ones let other threads run meanwhile.
        [encoding] = self._hf.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(
        self, ids: Iterable[int], skip_special_tokens: bool = True, continues: bool = False
    ) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, unknown ids become nothing.

        `continues`: the text goes on after other text (a completion after its prompt), so the
        leading space that some tokenizers put before every text is part of it and is kept.
        """
        data = bytearray()
        first = not continues
        for id in ids:
            if skip_special_tokens and id in self.special_ids:
                continue
            token = self.id_to_token(id)
            if token is None:
                continue
            data += self.token_bytes(id, first)
            first = False
        text = data.decode("utf-8", "replace")
        return text if continues else strip_start(text, *self._decoder.strip)

    @property
    def leading_strip(self) -> tuple[str, int]:
        """(character, how many of them) that `decode` drops at the start of a text."""
        return self._decoder.strip

    def id_to_token(self, id: int) -> str | None:
        """The vocabulary entry of `id` as it is stored, None if there is none."""
        if not 0 <= id < self.vocab_size:
            return None
        token: str | None = self._hf.id_to_token(id)
        return token

    def token_to_id(self, token: str) -> int | None:
        return _id(self._hf, token)

    def token_bytes(self, id: int, first: bool = False) -> bytes:
        """The bytes that `id` adds to a text, empty for an unknown id; a single token need not
        be whole characters. `first`: it is the first token of its text."""
        known = None if first else self._bytes.get(id)
        if known is not None:
            return known
        token = self.id_to_token(id)
        if token is None:
            return b""
        data = self._decoder.to_bytes(token, first)
        if not first:
            self._bytes[id] = data  # at most one entry per vocabulary entry
        return data

    def token_text(self, id: int) -> str:
        r"""The `token` of OpenAI's logprobs, whose `bytes` are `token_bytes(id)`.

        Bytes that are no whole character appear as `\xf0\x9f`: with U+FFFD, different
        alternatives would look the same, and /v1/completions keys them by this text.
        """
        return self.token_bytes(id).decode("utf-8", "backslashreplace")


def strip_start(text: str, char: str, count: int) -> str:
    """`text` without up to `count` of `char` at its start."""
    start = 0
    while start < count and text.startswith(char, start):
        start += 1
    return text[start:]


def _id(hf: HfTokenizer, token: str) -> int | None:
    id: int | None = hf.token_to_id(token)
    return id


def _eos_ids(directory: Path) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        value = (read_json(file) or {}).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(id) is int and id >= 0 for id in ids):
            raise ConfigError(
                f"{file}: eos_token_id must be a token id or a list of them, not {value!r}"
            )
        return ids
    return []

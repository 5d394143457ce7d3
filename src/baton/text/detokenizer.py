"""Token ids to text, as they come.

The concatenation of everything `push` and `flush` return equals `Tokenizer.decode` of all ids,
however the ids were split into pushes, because decoding is a concatenation of bytes (see
`token_decoder`). What is held back is at most the three bytes of a UTF-8 character whose end has
not come, so a push costs the length of its own tokens and nothing else.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from baton.text.tokenizer import Tokenizer, strip_start

_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one choice. Owns the few bytes held back; not for use by two threads at once.

    `continues` as in `Tokenizer.decode`.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, continues: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._first = not continues
        self._strip_char, count = tokenizer.leading_strip
        self._strip_left = 0 if continues else count
        self._utf8 = _new_utf8_decoder("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that is complete with these ids; may be empty."""
        data = bytearray()
        for id in token_ids:
            if id in self._skip:
                continue
            if self._first:
                if self._tokenizer.id_to_token(id) is None:
                    continue
                data += self._tokenizer.token_bytes(id, first=True)
                self._first = False
            else:
                data += self._tokenizer.token_bytes(id)
        return self._strip(self._utf8.decode(bytes(data)))

    def flush(self) -> str:
        """What was held back, at the end: U+FFFD for a character that never got whole."""
        return self._strip(self._utf8.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        if not self._strip_left or not text:
            return text
        stripped = strip_start(text, self._strip_char, self._strip_left)
        # Once anything else came, the start of the text is over.
        self._strip_left = 0 if stripped else self._strip_left - len(text)
        return stripped

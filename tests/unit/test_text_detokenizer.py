"""Detokenizer: pushes and flush join to decode of the whole, whatever the ids and the cuts."""

from __future__ import annotations

import functools
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.toy_tokenizers import SHAPES, write_model_dir

from baton.text.detokenizer import Detokenizer
from baton.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {
        name: Tokenizer.from_dir(write_model_dir(tmp_path_factory.mktemp(name), make()))
        for name, make in SHAPES.items()
    }


def chunked(draw: st.DrawFn, ids: list[int]) -> list[list[int]]:
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=len(ids) + 1)))
    edges = [0, *cuts, len(ids)]
    return [ids[low:high] for low, high in itertools.pairwise(edges)]


@functools.cache
def byte_ids(tokenizer: Tokenizer, shape: str) -> list[int]:
    """The ids of the 256 single-byte tokens."""
    if shape == "byte_level_bpe":
        single = {tokenizer.token_bytes(id): id for id in range(4, tokenizer.vocab_size)}
        return [single[bytes([byte])] for byte in range(256)]
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    assert None not in ids
    return [id for id in ids if id is not None]


@functools.cache  # strategies are made once a shape, not once an example
def id_lists(tokenizer: Tokenizer, shape: str) -> st.SearchStrategy[list[int]]:
    """Ids of real text, single bytes (mostly bad UTF-8), any ids and unknown ids, mixed."""
    single = byte_ids(tokenizer, shape)
    part = st.one_of(
        st.text(max_size=12).map(lambda text: tokenizer.encode(text)),
        st.sampled_from(["日本語", "😀👩‍👩‍👧", "e\u0301 नम", "  x", "\ufffd", "<s>"]).map(
            tokenizer.encode
        ),
        st.text(max_size=4).map(lambda text: [single[byte] for byte in text.encode()]),
        st.lists(st.sampled_from(single[0x80:]), max_size=8),
        st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=6),
        st.just([single[0x20]]),
    )
    return st.lists(part, max_size=5).map(lambda parts: [id for ids in parts for id in ids])


@settings(deadline=None, max_examples=600)
@given(st.data())
def test_pushes_join_to_decode_of_the_whole(tokenizers, data):
    shape = data.draw(st.sampled_from(sorted(SHAPES)))
    tokenizer = tokenizers[shape]
    ids = data.draw(id_lists(tokenizer, shape))
    skip, continues = data.draw(st.booleans()), data.draw(st.booleans())
    detokenizer = Detokenizer(tokenizer, skip, continues)
    pieces = [detokenizer.push(chunk) for chunk in chunked(data.draw, ids)]
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids, skip, continues)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_valid_text_never_shows_a_replacement_and_is_held_back_by_a_character_at_most(
    tokenizers, data
):
    shape = data.draw(st.sampled_from(["byte_level_bpe", "byte_fallback_bpe"]))
    tokenizer = tokenizers[shape]
    text = data.draw(
        st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"]), max_size=20)
    )
    detokenizer = Detokenizer(tokenizer)
    raw, shown = b"", ""
    for id in tokenizer.encode(text):
        shown += detokenizer.push([id])
        if id not in tokenizer.special_ids:
            raw += tokenizer.token_bytes(id)
        assert "\ufffd" not in shown
        assert text.startswith(shown)
        # Everything that is whole is shown at once (one leading space may be the tokenizer's).
        assert len(raw.decode("utf-8", "ignore")) - len(shown) <= 1
    assert detokenizer.flush() == ""
    assert shown == text


def push_bytes(tokenizer: Tokenizer, shape: str, data: bytes) -> list[str]:
    single = byte_ids(tokenizer, shape)
    detokenizer = Detokenizer(tokenizer, continues=True)
    return [detokenizer.push([single[byte]]) for byte in data] + [detokenizer.flush()]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_character_appears_whole_with_its_last_byte(tokenizers, shape):
    assert push_bytes(tokenizers[shape], shape, "é日😀".encode()) == [
        *["", "é"],
        *["", "", "日"],
        *["", "", "", "😀"],
        "",
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_bad_bytes_are_shown_as_soon_as_they_are_known_bad(tokenizers, shape):
    tokenizer = tokenizers[shape]
    assert push_bytes(tokenizer, shape, b"\xff\xff") == ["\ufffd", "\ufffd", ""]
    assert push_bytes(tokenizer, shape, b"\xe6a") == ["", "\ufffda", ""]
    assert push_bytes(tokenizer, shape, b"\xe6\xe6\x97\xa5") == ["", "\ufffd", "", "日", ""]
    assert push_bytes(tokenizer, shape, b"\xf0\x9f") == ["", "", "\ufffd"]
    # A surrogate spelled in UTF-8, an overlong slash, and beyond the last code point.
    assert "".join(push_bytes(tokenizer, shape, b"\xed\xa0\x80")) == "\ufffd" * 3
    assert "".join(push_bytes(tokenizer, shape, b"\xc0\xaf")) == "\ufffd" * 2
    assert "".join(push_bytes(tokenizer, shape, b"\xf4\x90\x80\x80")) == "\ufffd" * 4


class CountingTokenizer(Tokenizer):
    """Counts how often a token is looked at: what the work of a stream is made of."""

    looks = 0

    def token_bytes(self, id: int, first: bool = False) -> bytes:
        self.looks += 1
        return super().token_bytes(id, first)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("byte", [0x80, 0xE6, 0xF0, 0xFF])
def test_a_long_run_of_bad_bytes_flows_and_each_token_is_looked_at_once(tmp_path, shape, byte):
    tokenizer = CountingTokenizer.from_dir(write_model_dir(tmp_path, SHAPES[shape]()))
    assert isinstance(tokenizer, CountingTokenizer)
    id = byte_ids(tokenizer, shape)[byte]
    tokenizer.looks = 0
    detokenizer = Detokenizer(tokenizer)
    shown = 0
    for count in range(1, 2001):
        shown += len(detokenizer.push([id]))
        assert shown >= count - 1
    assert tokenizer.looks == 2000


def test_only_the_first_space_of_a_text_is_dropped(tokenizers):
    tokenizer = tokenizers["byte_fallback_bpe"]
    space, word = tokenizer.token_to_id("▁"), tokenizer.token_to_id("a")
    assert space is not None
    assert word is not None
    detokenizer = Detokenizer(tokenizer)
    pushes = [[1], [space], [], [space], [word], [space]]
    assert [detokenizer.push(ids) for ids in pushes] == ["", "", "", " ", "a", " "]
    late = Detokenizer(tokenizer)
    assert [late.push([word]), late.push([space])] == ["a", " "]


def test_skipped_and_unknown_ids_do_not_count_as_the_first_token(tokenizers):
    tokenizer = tokenizers["byte_fallback_unigram"]
    word = tokenizer.token_to_id("▁the")
    assert word is not None
    detokenizer = Detokenizer(tokenizer)
    ids = [1, tokenizer.vocab_size + 1, word, word]
    assert [detokenizer.push([id]) for id in ids] == ["", "", "the", " the"]
    assert tokenizer.decode(ids) == "the the"
    shown = Detokenizer(tokenizer, skip_special_tokens=False)
    assert [shown.push([id]) for id in ids] == ["<s>", "", " the", " the"]

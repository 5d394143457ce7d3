"""What one choice shows of its tokens."""

from __future__ import annotations

from itertools import pairwise

import pytest
from http_fixtures import toy_model_dir
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import Internal, InvalidRequest, Unavailable, WireError, WorkerLost
from baton.gateway.choice import ChoiceText, Piece, TextOptions
from baton.text.tokenizer import Tokenizer
from baton.types import FinishReason, SampledLogprobs, TokenDelta, TokenLogprob


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_dir(toy_model_dir(tmp_path_factory.mktemp("toy")))


def delta(
    ids: list[int], finish: FinishReason | None = None, logprobs: bool = False, **more: object
) -> TokenDelta:
    shown = tuple(SampledLogprobs(TokenLogprob(id, -1.0)) for id in ids) if logprobs else None
    return TokenDelta(
        request_id="r", choice=0, attempt=0, first_index=0, token_ids=tuple(ids),
        logprobs=shown, finish=finish, **more,  # type: ignore[arg-type]
    )  # fmt: skip


def byte_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token for each byte, so that every border falls inside something."""
    of_byte = {tokenizer.token_bytes(id): id for id in range(tokenizer.vocab_size)}
    return [of_byte[bytes([byte])] for byte in text.encode()]


def run(
    tokenizer: Tokenizer, options: TextOptions, batches: list[list[int]], last: FinishReason
) -> tuple[list[Piece], ChoiceText]:
    choice = ChoiceText(0, tokenizer, options)
    pieces = []
    for number, batch in enumerate(batches):
        finish = last if number == len(batches) - 1 else None
        pieces.append(choice.push(delta(batch, finish)))
        if pieces[-1].finish is not None:
            break
    return pieces, choice


def test_a_character_is_never_split(tokenizer: Tokenizer) -> None:
    ids = byte_ids(tokenizer, "é😀!")
    pieces, _ = run(tokenizer, TextOptions(), [[id] for id in ids], FinishReason.LENGTH)
    assert [piece.text for piece in pieces] == ["", "é", "", "", "", "😀", "!"]


def test_a_broken_character_at_the_end_is_shown(tokenizer: Tokenizer) -> None:
    ids = byte_ids(tokenizer, "a😀")[:-1]
    pieces, _ = run(tokenizer, TextOptions(), [ids], FinishReason.LENGTH)
    assert pieces[-1].text == "a\ufffd"


def test_a_stop_string_over_token_borders_ends_the_choice(tokenizer: Tokenizer) -> None:
    ids = byte_ids(tokenizer, "one END two")
    pieces, choice = run(
        tokenizer, TextOptions(stop=("END",)), [[id] for id in ids], FinishReason.LENGTH
    )
    assert "".join(piece.text for piece in pieces) == "one "
    assert pieces[-1].finish == "stop"
    assert choice.num_tokens == len("one END")


def test_the_stop_string_is_shown_on_request(tokenizer: Tokenizer) -> None:
    ids = byte_ids(tokenizer, "one END two")
    options = TextOptions(stop=("END",), include_stop=True)
    pieces, _ = run(tokenizer, options, [ids], FinishReason.LENGTH)
    assert pieces[-1].text == "one END"
    assert len(pieces[-1].token_ids) == len("one END")


def test_text_held_back_for_a_stop_string_comes_at_the_end(tokenizer: Tokenizer) -> None:
    ids = byte_ids(tokenizer, "one EN")
    pieces, _ = run(
        tokenizer, TextOptions(stop=("END",)), [[id] for id in ids], FinishReason.LENGTH
    )
    assert "".join(piece.text for piece in pieces) == "one EN"
    assert pieces[-1].finish == "length"


def test_stop_strings_are_looked_for_after_min_tokens(tokenizer: Tokenizer) -> None:
    ids = byte_ids(tokenizer, "xaxaxa")
    options = TextOptions(stop=("x",), min_tokens=3)
    pieces, choice = run(tokenizer, options, [[id] for id in ids], FinishReason.LENGTH)
    assert "".join(piece.text for piece in pieces) == "xaxa"
    assert choice.num_tokens == 5


def test_a_stop_token_has_no_text(tokenizer: Tokenizer) -> None:
    ids = byte_ids(tokenizer, "ab!")
    for include, text in ((False, "ab"), (True, "ab!")):
        options = TextOptions(stop_token_ids=frozenset({ids[-1]}), include_stop=include)
        pieces, choice = run(tokenizer, options, [ids], FinishReason.STOP)
        assert (pieces[-1].text, pieces[-1].finish) == (text, "stop")
        assert choice.num_tokens == 3


def test_special_tokens_are_hidden_unless_asked_for(tokenizer: Tokenizer) -> None:
    special = min(tokenizer.special_ids)
    ids = [*byte_ids(tokenizer, "a"), special, *byte_ids(tokenizer, "b")]
    for skip, text in ((True, "ab"), (False, f"a{tokenizer.id_to_token(special)}b")):
        options = TextOptions(skip_special_tokens=skip)
        pieces, _ = run(tokenizer, options, [ids], FinishReason.LENGTH)
        assert pieces[-1].text == text


def test_offsets_of_tokens_count_characters(tokenizer: Tokenizer) -> None:
    choice = ChoiceText(0, tokenizer, TextOptions(), first_offset=10)
    piece = choice.push(delta(byte_ids(tokenizer, "aé!"), FinishReason.LENGTH, logprobs=True))
    assert [token.offset for token in piece.shown] == [10, 11, 11, 12]


def test_cached_tokens_are_those_of_the_first_leg(tokenizer: Tokenizer) -> None:
    choice = ChoiceText(0, tokenizer, TextOptions())
    choice.push(delta(byte_ids(tokenizer, "a"), num_cached=0))
    choice.push(delta(byte_ids(tokenizer, "b"), num_cached=64))
    assert choice.num_cached == 0


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (delta([], FinishReason.ERROR, error=WireError("worker_lost", "gone")), WorkerLost),
        (delta([], FinishReason.ERROR), Internal),
        (delta([], FinishReason.ABORT), Unavailable),
    ],
)
def test_bad_ends_are_typed_errors(
    tokenizer: Tokenizer, last: TokenDelta, expected: type[Exception]
) -> None:
    with pytest.raises(expected):
        ChoiceText(0, tokenizer, TextOptions()).push(last)


def test_an_empty_stop_string_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest):
        ChoiceText(0, tokenizer, TextOptions(stop=("",)))


@given(data=st.data())
def test_batching_changes_nothing(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), min_size=1, max_size=40))
    letters = st.text("abcdehnort \n�", min_size=1, max_size=3)
    stop = data.draw(st.lists(letters, max_size=3))
    last = data.draw(st.sampled_from([FinishReason.LENGTH, FinishReason.STOP]))
    options = TextOptions(
        stop=tuple(stop),
        include_stop=data.draw(st.booleans()),
        stop_token_ids=frozenset(ids[-1:]),
        min_tokens=data.draw(st.integers(0, 5)),
    )
    cuts = sorted(data.draw(st.sets(st.integers(1, len(ids)))) | {0, len(ids)})
    batches = [ids[low:high] for low, high in pairwise(cuts)]
    results = []
    for form in ([ids], [[id] for id in ids], batches):
        pieces, choice = run(tokenizer, options, form, last)
        text = "".join(piece.text for piece in pieces)
        results.append((text, pieces[-1].finish, choice.num_tokens))
    assert results[0] == results[1] == results[2]

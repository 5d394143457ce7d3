"""Tokenizer: ids, text, bytes, special tokens, and errors that name the file."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as HfTokenizer
from unit.toy_tokenizers import (
    SHAPES,
    byte_fallback_bpe,
    byte_fallback_unigram,
    byte_level_bpe,
    write_model_dir,
)

from baton.errors import ConfigError, InvalidRequest
from baton.text.model_files import SpecialTokens
from baton.text.token_decoder import TokenDecoder
from baton.text.tokenizer import Tokenizer

TEXTS = [
    "Hello, world!",
    "  two spaces  and a tab\t\n\n",
    "日本語のテキスト、你好",
    "😀 👩‍👩‍👧 🇩🇪 👍🏽",
    "café e\u0301 नमस्ते",
    "mixed 日本 and 😀a\u0301 – “quotes”",
    "",
    " ",
    "\x00\x07\x1b",
    "\ufffd literal",
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, HfTokenizer]]:
    made = {}
    for name, make in SHAPES.items():
        hf = make()
        directory = write_model_dir(tmp_path_factory.mktemp(name), hf)
        made[name] = (Tokenizer.from_dir(directory), hf)
    return made


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode_are_those_of_tokenizers(pairs, shape, text):
    ours, hf = pairs[shape]
    for add in (True, False):
        ids = ours.encode(text, add_special_tokens=add)
        assert ids == hf.encode(text, add_special_tokens=add).ids
        assert ours.decode(ids) == hf.decode(ids)
        assert ours.decode(ids, False) == hf.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("shape", ["byte_level_bpe", "byte_fallback_bpe"])
@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_a_round_trip(pairs, shape, text):
    ours, _ = pairs[shape]
    assert ours.decode(ours.encode(text)) == text


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_decode_of_any_ids_is_that_of_tokenizers_up_to_bad_bytes(pairs, data):
    shape = data.draw(st.sampled_from(sorted(SHAPES)))
    ours, hf = pairs[shape]
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size + 3), max_size=20))
    skip = data.draw(st.booleans())
    text, reference = ours.decode(ids, skip), hf.decode(ids, skip_special_tokens=skip)
    if shape == "byte_level_bpe" or "\ufffd" not in reference:
        assert text == reference
    else:
        assert "\ufffd" in text


def test_bos_comes_from_the_post_processor_alone(pairs):
    ours, _ = pairs["byte_level_bpe"]
    assert ours.encode("a")[0] == 0
    assert ours.encode("a", add_special_tokens=False)[0] != 0
    unigram, _ = pairs["byte_fallback_unigram"]
    assert unigram.bos_token == "<s>"
    assert 1 not in unigram.encode("a")


def test_special_tokens_in_text_are_single_tokens_and_are_skipped(pairs):
    ours, _ = pairs["byte_level_bpe"]
    ids = ours.encode("<|im_start|>hi<|im_end|><think>", add_special_tokens=False)
    assert [ours.id_to_token(id) for id in (ids[0], ids[-2], ids[-1])] == [
        "<|im_start|>",
        "<|im_end|>",
        "<think>",
    ]
    assert ours.decode(ids) == "hi<think>"
    assert ours.decode(ids, skip_special_tokens=False) == "<|im_start|>hi<|im_end|><think>"


def test_continuing_text_keeps_its_leading_space(pairs):
    ours, _ = pairs["byte_fallback_bpe"]
    prompt = ours.encode("The quick")
    answer = ours.encode("brown fox", add_special_tokens=False)
    assert ours.decode(answer) == "brown fox"
    assert ours.decode(answer, continues=True) == " brown fox"
    assert ours.decode(prompt + answer) == "The quick" + ours.decode(answer, continues=True)


def test_vocabulary(pairs):
    ours, hf = pairs["byte_level_bpe"]
    assert ours.vocab_size == hf.get_vocab_size(with_added_tokens=True)
    assert ours.token_to_id("<think>") == ours.vocab_size - 1
    assert ours.token_to_id("nothing like it") is None
    assert ours.id_to_token(ours.vocab_size) is None
    assert ours.id_to_token(-1) is None
    assert ours.id_to_token(1 << 40) is None
    assert ours.decode([-1, ours.vocab_size, 1 << 40]) == ""


def test_vocab_size_covers_gaps_in_the_ids(tmp_path):
    hf = HfTokenizer(models.BPE(vocab={"a": 0, "b": 9}, merges=[]))
    assert Tokenizer.from_dir(write_model_dir(tmp_path, hf)).vocab_size == 10


def test_token_bytes_and_text_for_logprobs(pairs):
    ours, _ = pairs["byte_level_bpe"]
    whole = ours.encode(" fox", add_special_tokens=False)
    assert b"".join(map(ours.token_bytes, whole)) == b" fox"
    emoji = ours.encode("🜁", add_special_tokens=False)
    assert len(emoji) > 1
    assert b"".join(map(ours.token_bytes, emoji)) == "🜁".encode()
    assert all("\\x" in ours.token_text(id) for id in emoji)
    assert ours.token_text(3) == "<|im_end|>"
    assert ours.token_bytes(ours.vocab_size + 5) == b""

    fallback, _ = pairs["byte_fallback_bpe"]
    assert fallback.token_bytes(fallback.token_to_id("<0xE4>")) == b"\xe4"
    assert fallback.token_text(fallback.token_to_id("<0xE4>")) == r"\xe4"
    assert fallback.token_bytes(fallback.token_to_id("▁")) == b" "


def test_single_byte_tokens_have_distinct_logprob_texts(pairs):
    ours, _ = pairs["byte_fallback_bpe"]
    texts = [ours.token_text(ours.token_to_id(f"<0x{byte:02X}>")) for byte in range(256)]
    assert len(set(texts)) == 256


@pytest.mark.parametrize("shape", SHAPES)
def test_lone_surrogates_are_the_clients_fault(pairs, shape):
    ours, _ = pairs[shape]
    with pytest.raises(InvalidRequest, match=r"U\+DC00.*character 2") as caught:
        ours.encode("ab\udc00", param="messages")
    assert caught.value.param == "messages"


def test_encoding_lets_other_threads_run(pairs):
    ours, _ = pairs["byte_level_bpe"]
    text = "the quick brown fox 日本語 " * 40_000
    start = time.perf_counter()
    worker = threading.Thread(target=ours.encode, args=(text,))
    worker.start()
    turns = 0
    while worker.is_alive():
        time.sleep(0.001)
        turns += 1
    # With the GIL held throughout there would be one or two turns.
    assert turns > 5, f"{turns} turns in {time.perf_counter() - start:.2f} s"


def test_truncation_and_padding_in_the_file_are_switched_off(tmp_path):
    hf = byte_level_bpe()
    hf.enable_truncation(4)
    hf.enable_padding(length=64)
    ours = Tokenizer.from_dir(write_model_dir(tmp_path, hf))
    plain = byte_level_bpe()
    for text in ("a", "The quick brown fox jumps over the lazy dog. " * 3):
        assert ours.encode(text) == plain.encode(text).ids


# ------------------------------------------------------------------ end of sequence, specials


def eos_of(directory: Path, **files: object) -> tuple[int, ...]:
    write_model_dir(directory, byte_level_bpe(300))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return Tokenizer.from_dir(directory).eos_token_ids


def test_eos_ids(tmp_path):
    assert eos_of(tmp_path / "a") == (1,)
    assert eos_of(tmp_path / "b", generation_config={"eos_token_id": [3, 2]}) == (1, 2, 3)
    assert eos_of(tmp_path / "c", config={"eos_token_id": 3}) == (1, 3)
    both = {"config": {"eos_token_id": 2}, "generation_config": {"eos_token_id": 3}}
    assert eos_of(tmp_path / "d", **both) == (1, 3)
    unset = {"config": {"eos_token_id": 2}, "generation_config": {"eos_token_id": None}}
    assert eos_of(tmp_path / "e", **unset) == (1, 2)


def test_no_eos_at_all(tmp_path):
    write_model_dir(tmp_path, byte_level_bpe(300), {"eos_token": None})
    ours = Tokenizer.from_dir(tmp_path)
    assert ours.eos_token_ids == ()
    assert ours.eos_token is None


@pytest.mark.parametrize("value", ["</s>", -1, True, [1, "x"], 1.5])
def test_bad_eos_ids_name_file_and_field(tmp_path, value):
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id"):
        eos_of(tmp_path, generation_config={"eos_token_id": value})


def test_a_token_that_only_the_config_calls_special(tmp_path):
    hf = HfTokenizer(models.BPE(vocab={"a": 0, "<": 1, "e": 2, ">": 3, "<e>": 4}, merges=[]))
    config = {"bos_token": None, "eos_token": "<e>", "pad_token": "a"}
    ours = Tokenizer.from_dir(write_model_dir(tmp_path, hf, config))
    assert ours.encode("a<e>") == [0, 4]
    assert ours.special_ids == {4}
    assert ours.vocab_size == 5


def test_special_tokens_map_is_read_and_tokenizer_config_wins(tmp_path):
    write_model_dir(tmp_path, byte_level_bpe(300), {"bos_token": None})
    names = {"bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    ours = Tokenizer.from_dir(tmp_path)
    assert (ours.bos_token, ours.eos_token) == ("<s>", "</s>")


# ------------------------------------------------------------------ broken directories


def test_missing_tokenizer_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer\.json does not exist.*save_pretrained"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"model": {"type": 1}}']
)
def test_broken_tokenizer_names_the_file(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.from_dir(tmp_path)


def test_unreadable_tokenizer_names_the_file(tmp_path):
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(ConfigError, match=r"cannot read .*tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["tokenizer_config", "special_tokens_map", "generation_config", "config"],
)
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_broken_side_files_are_named(tmp_path, name, content):
    write_model_dir(tmp_path, byte_level_bpe(300))
    (tmp_path / f"{name}.json").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"/{name}\.json"):
        Tokenizer.from_dir(tmp_path)


def test_a_special_token_of_wrong_type_names_the_field(tmp_path):
    write_model_dir(tmp_path, byte_level_bpe(300), {"bos_token": 7})
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: bos_token"):
        Tokenizer.from_dir(tmp_path)


# ------------------------------------------------------------------ decoders


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.CTC(),
        decoders.BPEDecoder(),
        decoders.Strip(" ", 1, 0),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.Fuse(), decoders.ByteLevel()]),
    ],
    ids=repr,
)
def test_decoders_that_cannot_stream_are_refused(tmp_path, decoder):
    hf = byte_level_bpe(300)
    hf.decoder = decoder
    with pytest.raises(ConfigError, match=r"tokenizer\.json: `decoder`"):
        Tokenizer.from_dir(write_model_dir(tmp_path, hf))


@pytest.mark.parametrize(
    "spec",
    [
        [],
        {},
        {"type": 3},
        {"type": "Sequence"},
        {"type": "Sequence", "decoders": [None]},
        {"type": "Replace", "pattern": {"Regex": "a"}, "content": "b"},
        {"type": "Replace", "pattern": {"String": ""}, "content": "b"},
        {"type": "Metaspace", "replacement": ""},
        {"type": "Strip", "content": " "},
    ],
)
def test_malformed_decoders_are_refused(spec):
    with pytest.raises(ConfigError, match=r"FILE: `decoder`"):
        TokenDecoder(spec, "FILE")


DECODERS = [
    None,
    decoders.ByteLevel(),
    decoders.Metaspace(),
    decoders.Metaspace(prepend_scheme="never"),
    decoders.Metaspace(prepend_scheme="first"),
    decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 3, 0),
        ]
    ),
    decoders.Sequence([decoders.Fuse(), decoders.Strip("▁", 1, 0)]),
]


@pytest.mark.parametrize("decoder", DECODERS, ids=repr)
def test_each_decoder_agrees_with_tokenizers(decoder):
    pieces = ["▁", "▁▁", "▁a", "a▁b", "x y", "日本", "ä", "<0x41>", "<0x20>", "<0x4>", "Ġa", "<s>"]
    hf = HfTokenizer(models.BPE(vocab={piece: id for id, piece in enumerate(pieces)}, merges=[]))
    hf.add_tokens([AddedToken("added ▁")])
    if decoder is not None:
        hf.decoder = decoder
    check_decoder(hf)


def check_decoder(hf: HfTokenizer) -> None:
    spec = json.loads(hf.to_str())["decoder"]

    no_specials = SpecialTokens(Path("/nonexistent"))
    ours = Tokenizer(hf, TokenDecoder(spec, "FILE"), no_specials, ())

    @settings(deadline=None, max_examples=100)
    @given(st.lists(st.integers(0, ours.vocab_size - 1), max_size=6))
    def check(ids):
        assert ours.decode(ids) == hf.decode(ids)

    check()


def test_shapes_are_what_they_claim():
    """The other tests lean on these traits of the toy tokenizers."""
    level, fallback, unigram = byte_level_bpe(), byte_fallback_bpe(), byte_fallback_unigram()
    assert len(level.encode("🜁", add_special_tokens=False).ids) > 1
    assert "<0xF0>" in fallback.encode("🜁").tokens
    assert "<0xF0>" in unigram.encode("🜁").tokens
    assert fallback.encode("The fox").tokens[1].startswith("▁")


def test_no_torch_and_no_transformers():
    code = (
        "import sys, baton.text.tokenizer, baton.text.detokenizer, baton.text.stop,"
        " baton.text.chat_template;"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Checkpoints as they are found: sharded, in another type, odd, or broken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numerics.by_hand import Handmade, Sequence_, random_prompt
from numerics.tiny_models import VOCAB_SIZE, make_checkpoint, reference_logits, reference_model
from safetensors.torch import load_file, save_file

from baton.errors import ConfigError, ModelError
from baton.model.fingerprint import weight_files, weights_fingerprint
from baton.model.hub import resolve_model
from baton.model.loader import load_weights
from baton.model_spec import load_model_spec

INDEX = "model.safetensors.index.json"


@pytest.fixture
def llama(tmp_path) -> Path:
    return make_checkpoint(tmp_path / "llama", "llama")


@pytest.fixture
def tied(tmp_path) -> Path:
    return make_checkpoint(tmp_path / "tied", "qwen2")


def load(path: Path, dtype: str = "float32"):
    return load_weights(path, load_model_spec(path), dtype, "cpu")


def edit(path: Path, change) -> None:
    """Apply `change` to the dict of tensors of the single file of `path`."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def shard(path: Path) -> None:
    """Split the single file of `path` in three, with an index, as large checkpoints are."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    weight_map = {}
    for i in range(3):
        names = sorted(tensors)[i::3]
        file = f"model-{i + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names}, path / file)
        weight_map |= dict.fromkeys(names, file)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def tensors_of(weights) -> dict[str, torch.Tensor]:
    found = {"embed": weights.embed, "norm": weights.norm, "lm_head": weights.lm_head}
    for i, layer in enumerate(weights.layers):
        found |= {
            f"{i}.{name}": value
            for name in layer.__dataclass_fields__
            if (value := getattr(layer, name)) is not None
        }
    return found


def test_sharded_equals_single(llama):
    single = tensors_of(load(llama))
    shard(llama)
    assert len(weight_files(llama)) == 3
    sharded = tensors_of(load(llama))
    assert single.keys() == sharded.keys()
    assert all(torch.equal(single[name], sharded[name]) for name in single)


def test_large_tensors_arrive_in_pieces(llama, monkeypatch):
    whole = tensors_of(load(llama))
    monkeypatch.setattr("baton.model.checkpoint._PIECE_BYTES", 1000)
    steps = []
    spec = load_model_spec(llama)
    pieces = load_weights(llama, spec, "float32", "cpu", lambda *at: steps.append(at))
    assert all(torch.equal(whole[name], value) for name, value in tensors_of(pieces).items())
    total = 4 * spec.num_parameters()
    assert steps[-1] == (total, total)
    assert len(steps) > 500
    assert steps == sorted(steps)


def test_type_is_converted_on_the_way(tmp_path):
    path = make_checkpoint(tmp_path, "llama", dtype="bfloat16")
    assert load_model_spec(path).dtype == "bfloat16"
    wide, narrow = load(path, "float32"), load(path, "bfloat16")
    assert narrow.embed.dtype == torch.bfloat16
    assert torch.equal(wide.layers[1].qkv, narrow.layers[1].qkv.float())


def test_tied_embeddings_are_one_tensor(tied):
    weights = load(tied)
    assert weights.lm_head is weights.embed


def test_redundant_tensors_are_accepted(tied):
    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

    edit(tied, add)
    load(tied)


def break_tie(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


def test_a_tie_that_does_not_hold_is_refused(tied):
    edit(tied, break_tie)
    with pytest.raises(ModelError, match=r"lm_head\.weight differs"):
        load(tied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"model\.norm\.weight is missing"),
        (lambda t: t.pop("lm_head.weight"), r"lm_head\.weight is missing"),
        (lambda t: t.update({"model.extra": torch.ones(2)}), r"model\.extra .* is not expected"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
            r"q_proj\.bias .* is not expected",
        ),
        (
            lambda t: t.update({"model.layers.2.self_attn.k_proj.weight": torch.ones(64, 64)}),
            r"layers\.2\.self_attn\.k_proj\.weight has shape \[64, 64\], not \[32, 64\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}),
            r"model\.norm\.weight has type I8",
        ),
    ],
)
def test_wrong_tensors_are_named(llama, change, message):
    edit(llama, change)
    with pytest.raises(ModelError, match=message):
        load(llama)


def test_broken_files_are_named(llama):
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors is not a readable safetensors"):
        load(llama)
    file.unlink()
    with pytest.raises(ModelError, match=r"lacks model\.safetensors"):
        load(llama)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"model.norm.weight": "gone.safetensors"}}, "lacks gone"),
        ({"weight_map": {"model.norm.weight": "../x.safetensors"}}, "outside"),
        ({"weight_map": ["x"]}, "weight_map"),
    ],
)
def test_a_bad_index_is_refused(llama, index, message):
    (llama / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message):
        load(llama)


def test_older_configs_mean_the_same(tmp_path):
    """`rope_theta` and `rope_scaling` as they were written before transformers 5."""
    path = make_checkpoint(tmp_path, "llama-llama3", dtype="bfloat16")
    new = load_model_spec(path)
    config = json.loads((path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype")
    (path / "config.json").write_text(json.dumps(config))
    assert load_model_spec(path) == new
    prompt = random_prompt(300, VOCAB_SIZE, seed=5)
    found = Handmade.load(path).step([(Sequence_(prompt), 300)], every=True)
    expected = reference_logits(reference_model(path), prompt)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_fingerprint_depends_on_config_and_every_weight(llama):
    first = weights_fingerprint(llama)
    assert len(first) == 32
    assert weights_fingerprint(llama) == first
    config = (llama / "config.json").read_text()
    (llama / "config.json").write_text(config.replace("1e-06", "2e-06"))
    second = weights_fingerprint(llama)
    (llama / "config.json").write_text(config)

    def nudge(tensors):
        tensors["model.layers.2.mlp.down_proj.weight"][-1, -1] += 1e-3

    edit(llama, nudge)
    assert len({first, second, weights_fingerprint(llama)}) == 3


def test_names_that_are_no_models_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, message in [
        (str(tmp_path), "without a config.json"),
        (str(tmp_path / "gone"), "neither a directory nor"),
        ("nobody/such-a-model", "cannot be reached"),
    ]:
        with pytest.raises(ConfigError, match=message):
            resolve_model(name)
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path


_PEAK = """
import sys
from pathlib import Path
import torch
from baton.model.loader import load_weights
from baton.model_spec import load_model_spec

def peak():  # of this program, unlike getrusage, which remembers the one it was forked from
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024

path = Path(sys.argv[1])
spec = load_model_spec(path)
before = peak()
weights = load_weights(path, spec, "float32", "cpu")
print(peak() - before, weights.nbytes())
"""


def test_peak_memory_is_the_weights_and_a_piece(tmp_path):
    path = make_checkpoint(
        tmp_path, "llama", hidden_size=1024, intermediate_size=6144, vocab_size=32768
    )
    out = subprocess.run(
        [sys.executable, "-c", _PEAK, str(path)], capture_output=True, text=True, check=True
    ).stdout
    peak, weights = map(int, out.split())
    assert weights > 400 << 20
    assert peak < weights + (200 << 20)

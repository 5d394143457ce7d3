"""How much a model's next-token distributions move when its KV has been through a wire codec.

    text ─▶ windows of prompt and answer
            prompt ─▶ prefill ─▶ KV blocks ─┬───────────────────▶ answer, token by token: p
                                            └─ encode ─ decode ─▶ the same tokens again: q
                                                                  KL(p, q) at each position

As in a handoff, the prompt's blocks are lossy, the last one partly filled, and what is computed
after them is not. The answer is the text's own (teacher-forced), in one pass for each codec.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.config import Config
from baton.core.codec_choice import RAW
from baton.engine.build import LoadedModel, load_model
from baton.errors import ConfigError
from baton.fabric import codec_native
from baton.fabric.calibration import VERSION, Calibration, CodecLoss
from baton.fabric.codec import CODECS, Codec, codecs_for
from baton.model.batch import Batch
from baton.model.kv_cache import HostBlock, KvCache, kv_block_bytes
from baton.model_spec import ModelSpec
from baton.text.tokenizer import Tokenizer
from baton.types import KvFormat

NUM_WINDOWS: Final = 8
PROMPT_TOKENS: Final = 250
ANSWER_TOKENS: Final = 64
BUILT_IN: Final = Path(__file__).with_name("calibration.txt")

_Nats = npt.NDArray[np.float64]


def calibrate(
    config: Config,
    model_dir: Path,
    text_file: Path | None = None,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Measure every codec on the model in `model_dir`, by its own tokenizer.

    text_file: instead of the built-in text; a model without a tokenizer gets random tokens.
    told: is called with the windows done, and how many there are.

    Raises:
        ModelError, ConfigError: the model or the text cannot be used.
    """
    loaded = load_model(config, model_dir)
    windows, num_prompt, source = _windows(loaded.spec, model_dir, text_file)
    fmt = kv_format(loaded, config.engine.block_size)
    nats = kl_by_codec(loaded, fmt, windows, num_prompt, told)
    tokens = array("q", [token for window in windows for token in window])
    return Calibration(
        version=VERSION,
        codec_version=codec_native.VERSION,
        fingerprint=loaded.fingerprint.hex(),
        numerics=loaded.numerics,
        dtype=fmt.dtype,
        block_size=fmt.block_size,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        text=source,
        text_sha256=hashlib.sha256(tokens.tobytes()).hexdigest(),
        num_positions=len(nats[RAW]),
        codecs={
            name: CodecLoss(
                bytes_per_token=CODECS[name].encoded_bytes(fmt) / fmt.block_size,
                kl_mean=float(each.mean()),
                kl_p99=float(np.percentile(each, 99)),
                kl_max=float(each.max()),
            )
            for name, each in nats.items()
            if np.isfinite(each).all()  # else there is nothing that could be held to a budget
        },
    )


@torch.inference_mode()
def kl_by_codec(
    loaded: LoadedModel,
    fmt: KvFormat,
    windows: Sequence[Sequence[int]],
    num_prompt: int,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, _Nats]:
    """For each codec that takes `fmt`, raw among them: the divergence at every answered position.

    The first `num_prompt` tokens of each window are its prompt; all windows are equally long.
    """
    codecs = codecs_for(fmt)
    nats: dict[str, list[_Nats]] = {name: [] for name in codecs}
    one = _OneSequence(loaded, fmt.block_size, len(windows[0]))
    for index, window in enumerate(windows):
        told(index, len(windows))
        one.run(window[:num_prompt], 0, sample=False)
        blocks = [one.read(block) for block in range(-(-num_prompt // fmt.block_size))]
        truth = None
        for name, codec in codecs.items():
            for block, raw in enumerate(blocks):
                num_tokens = min(fmt.block_size, num_prompt - block * fmt.block_size)
                encoded = np.empty(codec.encoded_bytes(fmt), np.uint8)
                codec.encode(fmt, raw, encoded, num_tokens)
                one.write(block, encoded, codec, fmt)
            logprobs = one.run(window[num_prompt:], num_prompt, sample=True)
            truth = logprobs if name == RAW else truth
            assert truth is not None  # raw comes first
            nats[name].append(_kl(truth, logprobs))
    return {name: np.concatenate(each) for name, each in nats.items()}


def kv_format(loaded: LoadedModel, block_size: int) -> KvFormat:
    """The blocks of this model's pool."""
    spec = loaded.spec
    return KvFormat(
        block_size=block_size,
        dtype=loaded.dtype,
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        block_bytes=kv_block_bytes(spec, block_size, loaded.dtype),
    )


class _OneSequence:
    """A pool that holds one sequence, in blocks 0, 1, 2, ..."""

    def __init__(self, loaded: LoadedModel, block_size: int, num_tokens: int) -> None:
        num_blocks = -(-num_tokens // block_size)
        self._model = loaded.model
        self._device = loaded.device
        self._kv = KvCache(loaded.spec, num_blocks, block_size, loaded.dtype, loaded.device)
        self._table = torch.arange(num_blocks, device=loaded.device)[None]

    def run(self, tokens: Sequence[int], start: int, *, sample: bool) -> Tensor:
        """Compute tokens from position `start` on; fp64 log-probabilities [tokens or 0, vocab]."""
        positions = torch.arange(start, start + len(tokens), device=self._device)
        rows = torch.arange(len(tokens) if sample else 0, device=self._device)
        batch = Batch(
            token_ids=torch.tensor(list(tokens), device=self._device),
            positions=positions,
            slots=positions,
            query_starts=[0, len(tokens)],
            context_lens=[start + len(tokens)],
            block_tables=self._table,
            sample_rows=rows,
        )
        return self._model.forward(batch, self._kv).cpu().double().log_softmax(-1)

    def read(self, block: int) -> HostBlock:
        return self._kv.read_block(block).copy()

    def write(self, block: int, encoded: HostBlock, codec: Codec, fmt: KvFormat) -> None:
        landed = self._kv.landing(block)
        codec.decode(fmt, encoded, landed)
        self._kv.land(block, landed)


def _kl(p: Tensor, q: Tensor) -> _Nats:
    """KL(p, q) of each row; what rounding takes below 0 is 0."""
    nats: _Nats = (p.exp() * (p - q)).sum(-1).clamp(min=0).numpy()
    return nats


def _windows(
    spec: ModelSpec, model_dir: Path, text_file: Path | None
) -> tuple[list[list[int]], int, str]:
    """Windows of tokens, spread over the text; how much of each is prompt; the text's name."""
    num_answer = min(ANSWER_TOKENS, spec.max_position // 4)
    length = min(PROMPT_TOKENS + num_answer, spec.max_position)
    prefix, tokens, source = _tokens(spec, model_dir, text_file)
    width = length - len(prefix)
    if len(tokens) < width:
        raise ConfigError(
            f"{source} has {len(tokens)} tokens and calibration needs {width} at least: give a "
            "longer text with --text"
        )
    num_windows = min(NUM_WINDOWS, len(tokens) // width)
    last = len(tokens) - width
    starts = [round(i * last / max(1, num_windows - 1)) for i in range(num_windows)]
    return [prefix + tokens[at : at + width] for at in starts], length - num_answer, source


def _tokens(
    spec: ModelSpec, model_dir: Path, text_file: Path | None
) -> tuple[list[int], list[int], str]:
    """What every text begins with for this model, the text's tokens, and its name."""
    if not (model_dir / "tokenizer.json").is_file():
        if text_file is not None:
            raise ConfigError(
                f"{model_dir} has no tokenizer.json to read {text_file} with: leave out --text for "
                "random tokens"
            )
        number = NUM_WINDOWS * (PROMPT_TOKENS + ANSWER_TOKENS)
        rng = np.random.default_rng(0)
        return [], rng.integers(spec.vocab_size, size=number).tolist(), "random"
    file = text_file or BUILT_IN
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the text {file}: {error}") from None
    tokenizer = Tokenizer.from_dir(model_dir)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if max(tokens, default=0) >= spec.vocab_size:
        raise ConfigError(f"{model_dir}: tokenizer.json has tokens that the model does not know")
    return tokenizer.encode(""), tokens, "built-in" if text_file is None else str(text_file)

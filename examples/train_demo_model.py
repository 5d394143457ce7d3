"""Train the small model that this repository carries, and check what it remembers.

    python examples/train_demo_model.py --out models/baton-demo
    python examples/train_demo_model.py --out models/baton-demo-mini --size mini \\
        --like models/baton-demo --steps 5000 --learning-rate 6e-3
    python examples/train_demo_model.py --check models/baton-demo

The first command makes the questions and the tokenizer from the standard library of the Python
that runs it (demo_data.py) and trains a Llama-architecture model on them, in two phases: single
questions, then many-turned conversations; the second command reuses questions and tokenizer.
The last asks every question of the frozen list through the chat template, greedily, and counts
the answers that are right to the last character.  Only torch and Baton's own dependencies are
needed.  The same command, seed, thread count and machine give the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import jinja2.sandbox
import torch
import torch.nn.functional as F  # noqa: N812
from demo_batches import Batch, Data
from demo_data import (
    BOS_ID,
    END_ID,
    MAX_POSITIONS,
    PAD_ID,
    TOKENIZER_CONFIG,
    VOCAB_SIZE,
    Pair,
    make_pairs,
    read_pairs,
    running_text,
    train_tokenizer,
    write_pairs,
)
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

KV = tuple[Tensor, Tensor]
console = Console()


def llama_config(
    hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, num_kv_heads: int
) -> dict[str, Any]:
    """config.json as Hugging Face spells it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": MAX_POSITIONS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "bos_token_id": BOS_ID,
        "eos_token_id": END_ID,
        "pad_token_id": PAD_ID,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": 32,
    }


SIZES = {"demo": llama_config(256, 688, 6, 8, 4), "mini": llama_config(96, 256, 3, 4, 2)}


def linears(**shapes: tuple[int, int]) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})


class Layer(nn.Module):
    """One decoder layer; attributes carry the Hugging Face names, so the weights need no map."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, self.head_dim = config["hidden_size"], config["head_dim"]
        width = config["num_attention_heads"] * self.head_dim
        kv_width = config["num_key_value_heads"] * self.head_dim
        inner = config["intermediate_size"]
        self.input_layernorm = nn.RMSNorm(hidden, eps=1e-5)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=1e-5)
        self.self_attn = linears(
            q_proj=(hidden, width),
            k_proj=(hidden, kv_width),
            v_proj=(hidden, kv_width),
            o_proj=(width, hidden),
        )
        self.mlp = linears(
            gate_proj=(hidden, inner), up_proj=(hidden, inner), down_proj=(inner, hidden)
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: KV | None) -> tuple[Tensor, KV]:
        """x [batch, tokens, hidden] -> the same shape, and the keys and values so far."""
        h, attn, mlp = self.input_layernorm(x), self.self_attn, self.mlp
        q, k, v = (
            attn[name](h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        x = x + attn["o_proj"](attend(q, k, v).transpose(1, 2).flatten(2))
        h = self.post_attention_layernorm(x)
        return x + mlp["down_proj"](F.silu(mlp["gate_proj"](h)) * mlp["up_proj"](h)), (k, v)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the rotate-half convention; x [batch, heads, tokens, head_dim]."""
    low, high = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat((-high, low), -1) * sin.to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal grouped-query attention; q [batch, heads, tokens, head_dim] -> the same shape."""
    batch, heads, tokens, dim = q.shape
    if not q.requires_grad or tokens > 128:
        return F.scaled_dot_product_attention(q, k, v, is_causal=tokens > 1, enable_gqa=True)
    # The flash kernel's backward pass takes several times as long as this on short rows.
    kv_heads = k.shape[1]
    mask = torch.full((tokens, tokens), -1e9, dtype=q.dtype).triu(1).repeat(heads // kv_heads, 1)
    grouped = q.reshape(batch * kv_heads, -1, dim)
    keys, values = k.reshape(-1, tokens, dim), v.reshape(-1, tokens, dim)
    scores = torch.baddbmm(mask.expand(len(keys), -1, -1), grouped, keys.mT, alpha=dim**-0.5)
    return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ values).view(q.shape)


class Llama(nn.Module):
    """A plain Llama with tied embeddings: what is needed to train and to check, no more."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.RMSNorm(config["hidden_size"], eps=1e-5)
        dim = config["head_dim"]
        inverse = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
        angles = torch.outer(torch.arange(config["max_position_embeddings"]), inverse)
        self.angles = torch.cat((angles, angles), -1)
        out_std = 0.02 / math.sqrt(2 * config["num_hidden_layers"])
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                is_out = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=out_std if is_out else 0.02)

    def forward(self, ids: Tensor, past: list[KV] | None = None) -> tuple[Tensor, list[KV]]:
        """ids [batch, tokens] int64 -> hidden states [batch, tokens, hidden], keys and values."""
        start = past[0][0].shape[2] if past else 0
        angles = self.angles[start : start + ids.shape[1]]
        cos, sin = angles.cos(), angles.sin()
        x, kept = self.embed_tokens(ids), []
        for index, layer in enumerate(self.layers):
            x, kv = layer(x, cos, sin, past[index] if past else None)
            kept.append(kv)
        return self.norm(x), kept

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed_tokens.weight)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized by Newton-Schulz in bf16, at the update size of AdamW.

    On a CPU this is ten times as fast as torch.optim.Muon, which multiplies transposed views.
    """

    def __init__(self, matrices: list[nn.Parameter], momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                average = self.state[weight].setdefault("average", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(average, group["momentum"])
                tall = update.shape[0] > update.shape[1]
                x = (update.mT if tall else update).bfloat16().contiguous()
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    square = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
                size = 0.2 * max(weight.shape) ** 0.5
                weight.sub_((x.mT if tall else x).float(), alpha=group["lr"] * size)


class Phase(NamedTuple):
    """One stretch of training: its length in steps or, where given, minutes; see Data.batches."""

    steps: int
    minutes: float | None
    learning_rate: float
    chats: float


def train(model: Llama, data: Data, phase: Phase) -> None:
    """Muon for the matrices, AdamW for the rest; the rate falls linearly to zero."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.dim() == 1 or "embed" in n]
    optimizers = (Muon(matrices), torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0))
    began, now, step, loss_mean, right_mean = time.monotonic(), [0.0], 0, 0.0, 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task, logged = bar.add_task("training", total=1.0), began
        for batch in data.batches(now, phase.chats):
            elapsed = time.monotonic() - began
            now[0] = elapsed / 60 / phase.minutes if phase.minutes else step / phase.steps
            if now[0] >= 1:
                break
            loss, right = _step(model, batch)
            rate = min(1.0, step / 100) * (1 - now[0])
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = phase.learning_rate * rate
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            loss_mean += (0.02 if step > 1 else 1.0) * (loss - loss_mean)
            for index, is_right in zip(batch.pairs, right, strict=False):
                data.wrong[index] = not is_right
                right_mean += 0.0005 * (is_right - right_mean)
            line = f"step {step}, loss {loss_mean:.3f}, exact so far {right_mean:.1%}"
            bar.update(task, completed=now[0], description=line)
            if not console.is_terminal and time.monotonic() - logged > 30:
                logged = time.monotonic()
                print(f"{elapsed:.0f} s, {now[0]:.1%}, {line}", flush=True)
    print(f"trained {step} steps in {time.monotonic() - began:.0f} s", flush=True)


def _step(model: Llama, batch: Batch) -> tuple[float, list[bool]]:
    """Backward pass of one batch: the loss a token, and whether each row was right throughout."""
    counted = batch.targets != -100
    with torch.autocast("cpu", torch.bfloat16):
        hidden, _ = model(batch.inputs)
        logits = model.logits(hidden[counted])
    targets = batch.targets[counted]
    loss = F.cross_entropy(logits.float(), targets)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    hits = torch.ones_like(counted)
    hits[counted] = logits.argmax(-1) == targets
    return loss.item(), hits.all(1).tolist()


def export(model: Llama, tokenizer: Tokenizer, pairs: list[Pair], size: str, out: Path) -> None:
    """Write the directory that Hugging Face tools, and Baton, load."""

    def write(name: str, content: object) -> None:
        (out / name).write_text(json.dumps(content, indent=2) + "\n")

    out.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{n}": p.detach().to(torch.bfloat16) for n, p in model.named_parameters()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    write("config.json", SIZES[size])
    ids = {"bos_token_id": BOS_ID, "eos_token_id": [END_ID], "pad_token_id": PAD_ID}
    write("generation_config.json", {**ids, "do_sample": False})
    write("tokenizer_config.json", TOKENIZER_CONFIG)
    write_pairs(out / "questions.jsonl.gz", pairs)


def load(directory: Path, dtype: torch.dtype) -> Llama:
    model = Llama(json.loads((directory / "config.json").read_text()))
    weights = load_file(directory / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): w for name, w in weights.items()})
    return model.to(dtype).eval()


@torch.inference_mode()
def generate(model: Llama, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Greedy continuations of prompts of one length, each up to (and without) the end token."""
    ids, past, steps = torch.tensor(prompts), None, list[Tensor]()
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    while len(steps) < max_tokens and not ended.all():
        hidden, past = model(ids, past)
        ids = model.logits(hidden[:, -1]).argmax(-1, keepdim=True)
        steps.append(ids)
        ended |= ids[:, 0] == END_ID
    rows = torch.cat(steps, 1).tolist()
    return [row[: row.index(END_ID)] if END_ID in row else row for row in rows]


def check(
    directory: Path, dtype: torch.dtype, pairs: list[Pair], context: list[dict[str, str]]
) -> None:
    """Print the rate of exact answers, each question asked after the messages of a context."""
    model = load(directory, dtype)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    template = jinja2.sandbox.SandboxedEnvironment().from_string(settings["chat_template"])
    by_length: dict[int, list[tuple[list[int], Pair]]] = {}
    for pair in pairs:
        messages = [*context, {"role": "user", "content": pair.question}]
        text = template.render(
            messages=messages, bos_token=settings["bos_token"], add_generation_prompt=True
        )
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        by_length.setdefault(len(ids), []).append((ids, pair))
    max_tokens = 8 + max(len(row.ids) for row in tokenizer.encode_batch([p.answer for p in pairs]))
    num_right = 0
    for rows in by_length.values():
        for start in range(0, len(rows), 256):
            part = rows[start : start + 256]
            outputs = generate(model, [ids for ids, _ in part], max_tokens)
            answers = tokenizer.decode_batch(outputs, skip_special_tokens=False)
            num_right += sum(a == pair.answer for a, (_, pair) in zip(answers, part, strict=True))
    print(
        f"{str(dtype).removeprefix('torch.')}, after {len(context)} messages: "
        f"{num_right} of {len(pairs)} answers exact ({num_right / len(pairs):.2%})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="directory to write the model to")
    parser.add_argument("--check", type=Path, metavar="DIR", help="only check this model")
    parser.add_argument("--size", choices=sorted(SIZES), default="demo")
    parser.add_argument("--like", type=Path, metavar="DIR", help="reuse tokenizer and questions")
    parser.add_argument("--steps", type=int, default=1700, help="length of the first phase")
    parser.add_argument("--chat-steps", type=int, default=1200, help="length of the second phase")
    parser.add_argument("--minutes", type=float, help="length of both phases, in place of steps")
    parser.add_argument("--resume", action="store_true", help="second phase only, from --out")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.check is not None:
        check_all(args.check)
    elif args.out is not None:
        make(args)
    else:
        parser.error("one of --out and --check is needed")


def make(args: argparse.Namespace) -> None:
    """Data, training, export and the check, in one go."""
    torch.manual_seed(args.seed)
    texts = running_text()
    if args.like is None:
        pairs = make_pairs()
        tokenizer = train_tokenizer(t for p in pairs * 2 for t in p)
    else:
        pairs = read_pairs(args.like / "questions.jsonl.gz")
        tokenizer = Tokenizer.from_file(str(args.like / "tokenizer.json"))
    model = Llama(SIZES[args.size])
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(pairs)} questions, {num_parameters / 1e6:.2f} M parameters", flush=True)
    first, second = (args.minutes * 0.7, args.minutes * 0.3) if args.minutes else (None, None)
    phases = (
        Phase(args.steps, first, args.learning_rate, chats=0.12),
        Phase(args.chat_steps, second, args.learning_rate / 2, chats=1.0),
    )
    for number, phase in enumerate(phases):
        if number or not args.resume:
            train(model, Data(tokenizer, pairs, texts, random.Random(args.seed + number)), phase)
            export(model, tokenizer, pairs, args.size, args.out)
        model = load(args.out, torch.float32)  # what bf16 kept is what the next phase starts from
    check_all(args.out)


def check_all(directory: Path) -> None:
    """The whole list as stored (bf16) and in fp32, and a sample late in a conversation."""
    pairs = read_pairs(directory / "questions.jsonl.gz")
    check(directory, torch.bfloat16, pairs, [])
    check(directory, torch.float32, pairs, [])
    rng = random.Random(1)
    for num_turns in (0, 5, 25):
        context = [{"role": "system", "content": "You are a helpful assistant."}]
        for pair in rng.sample(pairs, num_turns):
            context.append({"role": "user", "content": pair.question})
            context.append({"role": "assistant", "content": pair.answer})
        check(directory, torch.bfloat16, rng.sample(pairs, 400), context)


if __name__ == "__main__":
    main()

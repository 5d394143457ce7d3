"""The kernels of `triton_kernels.rows` on tensors: all contiguous, all on one device."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

_COLUMNS = 1024  # of silu_mul, a program
_TOGETHER = 8  # heads of rotate_and_write, a program


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    warps: int = 4,
    stages: int = 3,
    **constants: Any,
) -> None:
    """Run a Triton kernel over `grid`; nothing happens if that is empty."""
    if all(grid):
        # Multiply-adds are fused whatever Triton's default is: it changes between versions.
        kernel[grid](*args, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True)


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Add `delta` to `x` in place; returns norm(x) * weight. All [T, N], weight [N]."""
    from baton.model.triton_kernels import rows

    out = torch.empty_like(x)
    width = x.shape[1]
    pad = _power_of_two(width)
    launch(
        rows.add_rms_norm, (x.shape[0],), x, x if delta is None else delta, weight, out, eps,
        WIDTH=width, WIDTH_PAD=pad, ADDS=delta is not None, warps=8 if pad > 2048 else 4,
    )  # fmt: skip
    return out


def rotate_and_write(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    k: Tensor,
    v: Tensor,
    eps: float,
) -> None:
    """Norm and rotate Q in place and K into the pool, with V.

    qkv: [T, heads + 2 kv_heads, head_dim]. norms: weights [head_dim] for Q and K. cos, sin: fp32
    [T, head_dim / 2]. slots: [T] int64, all different but for negative ones, which store nothing.
    k, v: the layer's part of the pool, [num_blocks, block_size, kv_heads, head_dim].
    """
    from baton.model.triton_kernels import rows

    num_tokens, all_heads, dim = qkv.shape
    kv_heads = k.shape[2]
    q_norm, k_norm = norms or (cos, cos)
    launch(
        rows.rotate_and_write, (num_tokens, -(-all_heads // _TOGETHER)),
        qkv, q_norm, k_norm, cos, sin, slots, k, v, k.stride(0), eps,
        HEADS=all_heads - 2 * kv_heads, KV_HEADS=kv_heads, HEAD_DIM=dim,
        HALF_PAD=_power_of_two(dim // 2), BLOCK_SIZE=k.shape[1], NORMS=norms is not None,
        TOGETHER=_TOGETHER,
    )  # fmt: skip


def silu_mul(x: Tensor) -> Tensor:
    """x [T, 2 N], gate then up, to silu(gate) * up [T, N]."""
    from baton.model.triton_kernels import rows

    num_rows, width = x.shape[0], x.shape[1] // 2
    out = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    block = min(_COLUMNS, _power_of_two(width))
    launch(rows.silu_mul, (num_rows, -(-width // block)), x, out, WIDTH=width, BLOCK=block)
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [M, K] times weight [N, K] transposed, plus bias, by the vendor's library: [M, N]."""
    return F.linear(x, weight, bias)


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same with a row's bits independent of M: one tile shape, one order of summation."""
    from baton.model.triton_kernels import rows

    (num_rows, depth), width = x.shape, weight.shape[0]
    wide = x.dtype == torch.float32
    row_tile, column_tile, depth_tile = (32, 64, 32) if wide else (64, 128, 64)
    out = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    launch(
        rows.matmul, (-(-num_rows // row_tile), -(-width // column_tile)),
        x, weight, weight if bias is None else bias, out, num_rows,
        N=width, K=depth, BIASED=bias is not None, PRECISION="ieee" if wide else "tf32",
        ROWS=row_tile, COLUMNS=column_tile, DEPTH=depth_tile, stages=4,
    )  # fmt: skip
    return out


def stage_decode(
    batch: tuple[Tensor, Tensor, Tensor, Tensor],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    bucket: int,
) -> None:
    """Copy n decode rows into the first of `inputs`, and padding into the rows up to `bucket`.

    batch: token ids, positions, slots [n], block tables [n, any]. inputs: the same with at least
    `bucket` rows, and before the tables the lengths of context (int32), which are position + 1.
    """
    from baton.model.triton_kernels import rows

    ids, _, _, tables = batch
    launch(
        rows.stage_decode, (bucket,), *batch, ids.numel(), tables.shape[1], tables.stride(0),
        *inputs, inputs[-1].stride(0), BLOCK=256,
    )  # fmt: skip


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()

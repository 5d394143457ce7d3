"""The small steps between the products, each one pass over memory; and a product of fixed order.

Everything is computed in fp32 and rounded once, where it is stored.
"""

import triton
import triton.language as tl


@triton.jit
def add_rms_norm(
    x_ptr, delta_ptr, weight_ptr, out_ptr, eps,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    """x += delta (if ADDS), out = norm(x) * weight; all [T, WIDTH]. Grid: (T,)."""
    columns = tl.arange(0, WIDTH_PAD)
    mask = columns < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + columns
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    if ADDS:
        delta = tl.load(delta_ptr + at, mask=mask, other=0.0)
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + at, x, mask=mask)
    wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (wide * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rotate_and_write(
    qkv_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, slots_ptr, k_ptr, v_ptr, block_stride, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, NORMS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Norm (if NORMS) and rotate Q in place; norm, rotate and store K; store V.

    qkv [T, HEADS + 2 KV_HEADS, HEAD_DIM]; cos and sin fp32 [T, HEAD_DIM / 2]; slots [T], where a
    negative one stores nothing. Grid: (T, groups of TOGETHER heads).
    """
    half: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    dims = tl.arange(0, HALF_PAD)
    inside = dims < half
    mask = (heads < HEADS + 2 * KV_HEADS)[:, None] & inside[None, :]
    at = (token * (HEADS + 2 * KV_HEADS) + heads)[:, None] * HEAD_DIM + dims[None, :]
    low = tl.load(qkv_ptr + at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(qkv_ptr + at + half, mask=mask, other=0.0).to(tl.float32)
    is_q = heads < HEADS
    is_v = heads >= HEADS + KV_HEADS
    if NORMS:
        squares = tl.sum(low * low, 1) + tl.sum(high * high, 1)
        scale = tl.where(is_v, 1.0, 1.0 / tl.sqrt(squares / HEAD_DIM + eps))[:, None]
        q_low = tl.load(q_norm_ptr + dims, mask=inside, other=0.0).to(tl.float32)[None, :]
        k_low = tl.load(k_norm_ptr + dims, mask=inside, other=0.0).to(tl.float32)[None, :]
        q_high = tl.load(q_norm_ptr + half + dims, mask=inside, other=0.0).to(tl.float32)[None, :]
        k_high = tl.load(k_norm_ptr + half + dims, mask=inside, other=0.0).to(tl.float32)[None, :]
        low *= scale * tl.where(is_v[:, None], 1.0, tl.where(is_q[:, None], q_low, k_low))
        high *= scale * tl.where(is_v[:, None], 1.0, tl.where(is_q[:, None], q_high, k_high))
    cos = tl.load(cos_ptr + token * half + dims, mask=inside, other=0.0)[None, :]
    sin = tl.load(sin_ptr + token * half + dims, mask=inside, other=0.0)[None, :]
    new_low = tl.where(is_v[:, None], low, low * cos - high * sin)
    new_high = tl.where(is_v[:, None], high, high * cos + low * sin)
    element = qkv_ptr.dtype.element_ty
    q_mask = mask & is_q[:, None]
    tl.store(qkv_ptr + at, new_low.to(element), mask=q_mask)
    tl.store(qkv_ptr + at + half, new_high.to(element), mask=q_mask)
    slot = tl.load(slots_ptr + token)
    k_begin = tl.where(slot >= 0, HEADS, HEADS + 2 * KV_HEADS)  # no head is beyond the last
    slot = tl.maximum(slot, 0).to(tl.int64)
    base = (slot // BLOCK_SIZE) * block_stride + (slot % BLOCK_SIZE) * (KV_HEADS * HEAD_DIM)
    kv_heads = tl.where(is_v, heads - KV_HEADS, heads) - HEADS
    kv_at = base + kv_heads[:, None] * HEAD_DIM + dims[None, :]
    stored = mask & (heads >= k_begin)[:, None]
    k_mask = stored & (heads < HEADS + KV_HEADS)[:, None]
    v_mask = stored & is_v[:, None]
    tl.store(k_ptr + kv_at, new_low.to(element), mask=k_mask)
    tl.store(k_ptr + kv_at + half, new_high.to(element), mask=k_mask)
    tl.store(v_ptr + kv_at, new_low.to(element), mask=v_mask)
    tl.store(v_ptr + kv_at + half, new_high.to(element), mask=v_mask)


@triton.jit
def silu_mul(x_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """x [T, 2 WIDTH], gate then up, to silu(gate) * up [T, WIDTH]. Grid: (T, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    gate = tl.load(x_ptr + row * (2 * WIDTH) + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * (2 * WIDTH) + WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    found = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * WIDTH + columns, found.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def matmul(
    x_ptr, weight_ptr, bias_ptr, out_ptr, num_rows,
    N: tl.constexpr, K: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """x [M, K] times weight [N, K] transposed, plus bias: [M, N], each sum in the order of K.

    Grid: (row tiles, column tiles). One tile shape for every M is what makes a row's bits its own.
    """
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    depths = tl.arange(0, DEPTH)
    found = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, K, DEPTH):
        deep = k + depths < K
        x_mask = (rows < num_rows)[:, None] & deep[None, :]
        x = tl.load(x_ptr + rows[:, None] * K + (k + depths)[None, :], mask=x_mask, other=0.0)
        w_mask = (columns < N)[None, :] & deep[:, None]
        w_at = columns[None, :] * K + (k + depths)[:, None]
        w = tl.load(weight_ptr + w_at, mask=w_mask, other=0.0)
        found = tl.dot(x, w, found, input_precision=PRECISION)
    if BIASED:
        bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
        found += bias[None, :]
    mask = (rows < num_rows)[:, None] & (columns < N)[None, :]
    out_at = rows[:, None] * N + columns[None, :]
    tl.store(out_ptr + out_at, found.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_blocks", "table_stride"])
def stage_decode(
    ids_ptr, positions_ptr, slots_ptr, tables_ptr, num_rows, num_blocks, table_stride,
    ids_out, positions_out, slots_out, lens_out, tables_out, table_stride_out,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Lay a decode batch of num_rows sequences where a recorded step reads it. Grid: (rows,).

    A row beyond them is padding: token 0, a slot that stores nothing, a context of 0.
    """
    row = tl.program_id(0).to(tl.int64)
    real = row < num_rows
    position = tl.load(positions_ptr + row, mask=real, other=0)
    tl.store(ids_out + row, tl.load(ids_ptr + row, mask=real, other=0))
    tl.store(positions_out + row, position)
    tl.store(slots_out + row, tl.load(slots_ptr + row, mask=real, other=-1))
    tl.store(lens_out + row, tl.where(real, position + 1, 0).to(tl.int32))
    width = tl.where(real, num_blocks, 0)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = columns < width
        blocks = tl.load(tables_ptr + row * table_stride + columns, mask=mask, other=0)
        tl.store(tables_out + row * table_stride_out + columns, blocks, mask=mask)

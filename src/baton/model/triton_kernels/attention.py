"""Paged attention. Context is walked in tiles of fixed length that begin at absolute positions.

All kernels read K and V of one layer from the pool, a block at `block_stride` elements from the
one before it, whatever lies between; offsets of blocks are 64 bits wide. The query heads that
share a KV head are rows of one tile, so K and V are read once for all of them. Scores, softmax and
sums are fp32. Head sizes that are no power of two are padded with zeros in registers.

A row sees its last `window` positions, its own included; without a window that is `NO_WINDOW`.
What lies in the pool beyond a sequence's context may be NaN: it is masked when it is loaded.
"""

import triton
import triton.language as tl

NO_WINDOW = 1 << 30


@triton.jit
def _accumulate(
    q, row_end, row_begin, best, total, found,
    k_ptr, v_ptr, table_ptr, block_stride, tile, load_end, head, scale_log2,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take one tile of the context into a running softmax (maximum, sum, weighted V).

    A row sees positions row_begin <= p < row_end; no row sees load_end or beyond. For a row that
    sees nothing of the tile nothing changes, not even a bit.
    """
    positions = tile * TILE + tl.arange(0, TILE)
    dims = tl.arange(0, DIM_PAD)
    present = positions < load_end
    blocks = tl.load(table_ptr + positions // BLOCK_SIZE, mask=present, other=0).to(tl.int64)
    slots = (positions % BLOCK_SIZE) * (KV_HEADS * HEAD_DIM) + head * HEAD_DIM
    at = (blocks * block_stride + slots)[:, None] + dims[None, :]
    loaded = present[:, None] & (dims < HEAD_DIM)[None, :]
    k = tl.load(k_ptr + at, mask=loaded, other=0.0)
    v = tl.load(v_ptr + at, mask=loaded, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    seen = (positions[None, :] < row_end[:, None]) & (positions[None, :] >= row_begin[:, None])
    scores = tl.where(seen, scores, float("-inf"))
    best_now = tl.maximum(best, tl.max(scores, 1))
    # A row that has seen nothing yet has no maximum; any finite one makes its weights zero.
    finite = tl.where(best_now == float("-inf"), 0.0, best_now)
    weights = tl.exp2(scores - finite[:, None])
    decay = tl.exp2(best - finite)
    total = total * decay + tl.sum(weights, 1)
    found = tl.dot(weights.to(v.dtype), v, found * decay[:, None], input_precision=PRECISION)
    return best_now, total, found


@triton.jit(do_not_specialize=["table_stride"])
def prefill(
    q_ptr, k_ptr, v_ptr, out_ptr, tiles_ptr, starts_ptr, lens_ptr, tables_ptr,
    q_stride, block_stride, table_stride, scale_log2, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Ragged causal attention. Grid: (query tiles, KV heads).

    A query tile is ROWS // GROUP tokens of one sequence, each with its GROUP heads. `tiles`
    [n, 2]: sequence, and the tile's first token within the sequence's chunk.
    """
    head = tl.program_id(1)
    sequence = tl.load(tiles_ptr + 2 * tl.program_id(0))
    first = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1)
    start = tl.load(starts_ptr + sequence)
    count = tl.load(starts_ptr + sequence + 1) - start
    context = tl.load(lens_ptr + sequence)
    before = context - count
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_PAD)
    tokens = first + rows // GROUP
    live = (rows < (ROWS // GROUP) * GROUP) & (tokens < count)
    heads = head * GROUP + rows % GROUP
    mask = live[:, None] & (dims < HEAD_DIM)[None, :]
    token_rows = (start + tokens).to(tl.int64)
    q_at = (token_rows * q_stride + heads * HEAD_DIM)[:, None] + dims[None, :]
    q = tl.load(q_ptr + q_at, mask=mask, other=0.0)
    row_end = before + tokens + 1
    tile_begin = tl.maximum(before + first + 1 - window, 0) // TILE
    load_end = tl.minimum(before + first + ROWS // GROUP, context)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    found = tl.zeros([ROWS, DIM_PAD], tl.float32)
    table_ptr = tables_ptr + sequence.to(tl.int64) * table_stride
    for tile in range(tile_begin, tl.cdiv(load_end, TILE)):
        best, total, found = _accumulate(
            q, row_end, row_end - window, best, total, found,
            k_ptr, v_ptr, table_ptr, block_stride, tile, load_end, head, scale_log2,
            KV_HEADS, HEAD_DIM, DIM_PAD, BLOCK_SIZE, TILE, PRECISION,
        )  # fmt: skip
    found = found / tl.where(total == 0.0, 1.0, total)[:, None]
    width: tl.constexpr = KV_HEADS * GROUP * HEAD_DIM
    out_at = (token_rows * width + heads * HEAD_DIM)[:, None] + dims[None, :]
    tl.store(out_ptr + out_at, found.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _splits(context, window, TILE: tl.constexpr, MIN_TILES: tl.constexpr, SPLITS: tl.constexpr):
    """How a row's context is cut: (first tile, tiles, tiles a split, splits).

    It follows from the row's own length alone, never from the batch or the device.
    """
    tile_begin = tl.maximum(context - window, 0) // TILE
    num_tiles = tl.cdiv(context, TILE) - tile_begin
    each = tl.maximum(tl.cdiv(num_tiles, SPLITS), MIN_TILES)
    return tile_begin, num_tiles, each, tl.cdiv(num_tiles, each)


@triton.jit(do_not_specialize=["table_stride"])
def decode_splits(
    q_ptr, k_ptr, v_ptr, sums_ptr, stats_ptr, rows_ptr, starts_ptr, lens_ptr, tables_ptr,
    q_stride, block_stride, table_stride, scale_log2, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
    MIN_TILES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Attention of sequences with one new token, split over the context.

    Grid: (n, KV heads, any number). The programs of the third axis share out the splits; how many
    there are changes who computes a split, not what is computed. `rows` [n]: the sequences. Leaves
    for `decode_reduce` of each split: sums [n, heads, SPLITS, HEAD_DIM], stats [n, heads, SPLITS,
    2] (maximum, sum of weights), fp32. A context of 0 has no split.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    sequence = tl.load(rows_ptr + row).to(tl.int64)
    token = tl.load(starts_ptr + sequence).to(tl.int64)
    context = tl.load(lens_ptr + sequence)
    members = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_PAD)
    heads = head * GROUP + members
    mask = (members < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    q_at = token * q_stride + heads[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptr + q_at, mask=mask, other=0.0)
    row_end = tl.zeros([ROWS], tl.int32) + context
    tile_begin, num_tiles, each, num_splits = _splits(context, window, TILE, MIN_TILES, SPLITS)
    table_ptr = tables_ptr + sequence * table_stride
    for split in range(tl.program_id(2), num_splits, tl.num_programs(2)):
        best = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        found = tl.zeros([ROWS, DIM_PAD], tl.float32)
        last = tl.minimum((split + 1) * each, num_tiles)
        for tile in range(tile_begin + split * each, tile_begin + last):
            best, total, found = _accumulate(
                q, row_end, row_end - window, best, total, found,
                k_ptr, v_ptr, table_ptr, block_stride, tile, context, head, scale_log2,
                KV_HEADS, HEAD_DIM, DIM_PAD, BLOCK_SIZE, TILE, PRECISION,
            )  # fmt: skip
        at = (row * (KV_HEADS * GROUP) + heads) * SPLITS + split
        tl.store(sums_ptr + at[:, None] * HEAD_DIM + dims[None, :], found, mask=mask)
        tl.store(stats_ptr + 2 * at, best, mask=members < GROUP)
        tl.store(stats_ptr + 2 * at + 1, total, mask=members < GROUP)


@triton.jit
def decode_reduce(
    sums_ptr, stats_ptr, out_ptr, rows_ptr, starts_ptr, lens_ptr, window,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    TILE: tl.constexpr, MIN_TILES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Join the splits of `decode_splits`: out [T, HEADS * HEAD_DIM]. Grid: (n, HEADS).

    A context of 0 gives zeros.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    sequence = tl.load(rows_ptr + row)
    token = tl.load(starts_ptr + sequence).to(tl.int64)
    context = tl.load(lens_ptr + sequence)
    _, _, _, num_splits = _splits(context, window, TILE, MIN_TILES, SPLITS)
    splits = tl.arange(0, SPLITS)
    dims = tl.arange(0, DIM_PAD)
    at = (row * HEADS + head) * SPLITS + splits
    present = splits < num_splits
    best = tl.load(stats_ptr + 2 * at, mask=present, other=float("-inf"))
    total = tl.load(stats_ptr + 2 * at + 1, mask=present, other=0.0)
    mask = present[:, None] & (dims < HEAD_DIM)[None, :]
    sums = tl.load(sums_ptr + at[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
    most = tl.max(best, 0)
    scale = tl.exp2(best - tl.where(most == float("-inf"), 0.0, most))
    weight = tl.sum(total * scale, 0)
    found = tl.sum(sums * scale[:, None], 0) / tl.where(weight == 0.0, 1.0, weight)
    out_at = token * (HEADS * HEAD_DIM) + head * HEAD_DIM + dims
    tl.store(out_ptr + out_at, found.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)

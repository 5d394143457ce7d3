"""Compile every kernel that a forward pass launches, for an H100 or H200, without one.

    python tests/numerics/compile_triton.py SPEC_JSON DTYPE BLOCK_SIZE EXACT

Run it without TRITON_INTERPRET. The model is on the meta device: nothing is computed, but what is
launched is what would be. Prints a line for each kernel: name and bytes of shared memory.
"""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from baton.model import attention_triton, triton_ops
from baton.model.batch import Batch
from baton.model.cuda_layers import CudaLayers
from baton.model.kv_cache import KvCache
from baton.model.weights import allocate
from baton.model_spec import ModelSpec

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32",
    torch.int64: "*i64",
}  # fmt: skip

compiled: dict[str, int] = {}


def compile_only(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    warps: int = 4,
    stages: int = 3,
    **constants: Any,
) -> None:
    """In the place of `triton_ops.launch`."""
    types: dict[str, str] = {}
    for name, arg in zip(kernel.arg_names, args, strict=False):
        scalar = "fp32" if isinstance(arg, float) else "i32"
        types[name] = POINTERS[arg.dtype] if isinstance(arg, Tensor) else scalar
    types |= dict.fromkeys(constants, "constexpr")
    assert types.keys() == set(kernel.arg_names), types.keys() ^ set(kernel.arg_names)
    types = {name: types[name] for name in kernel.arg_names}
    places = {name: (index,) for index, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        types,
        {places[name]: value for name, value in constants.items()},
        {places[n]: [["tt.divisibility", 16]] for n, type_ in types.items() if type_[0] == "*"},
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    made = triton.compile(source, target=TARGET, options=options)
    compiled[kernel.__name__] = made.metadata.shared


def main() -> None:
    spec = msgspec.json.decode(sys.argv[1], type=ModelSpec)
    dtype, block_size, exact = sys.argv[2], int(sys.argv[3]), sys.argv[4] == "True"
    triton_ops.launch = attention_triton.launch = compile_only
    weights, _ = allocate(spec, getattr(torch, dtype), "meta")
    kv = KvCache(spec, 8, block_size, dtype, "meta")
    model = CudaLayers(spec, weights, exact)
    rows = torch.zeros(4, dtype=torch.int64, device="meta")
    tables = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    model.forward(Batch(rows, rows, rows, [0, 1, 4], [9, 9], tables, rows[:2]), kv)
    model.forward(Batch(rows[:2], rows[:2], rows[:2], [0, 1, 2], [9, 9], tables, rows[:2]), kv)
    for name, shared in compiled.items():
        print(name, shared)


if __name__ == "__main__":
    main()

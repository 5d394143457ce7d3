"""Triton's kernels as the tests get at them: on the GPU if there is one, else interpreted.

Importing this corrects what the interpreter does not do as a device does. In a dot it multiplies
the bit patterns of bf16 operands, and leaves the order of summation to a library that treats the
rows of a matrix differently, where a matrix unit treats them all alike. And it truncates to bf16
instead of rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SUMS = 2e-6
"""Of the norm of the error to the norm of the result, for sums of fp32."""
ROUNDED = {torch.float32: SUMS, torch.bfloat16: 2.5e-3}
"""The same when it was rounded once to the type."""


def error(found: Tensor, expected: Tensor) -> float:
    """Relative error of a tensor; infinite if it holds anything that is not finite."""
    if not found.isfinite().all():
        return float("inf")
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def _correct_the_interpreter() -> None:
    builder = interpreter.InterpreterBuilder
    interpreted_cast = builder.cast_impl

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        left, right = (
            (interpreted_cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x).data
            for x in (a, b)
        )
        # A sum over an axis that is not the last is taken one element after the other.
        products = np.sum(left[:, :, None] * right[None, :, :], axis=1)
        return interpreter.TensorHandle(products + d.data, tl.float32)

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            wide = torch.from_numpy(np.ascontiguousarray(src.data))
            bits = wide.to(torch.bfloat16).view(torch.uint16).numpy()
            return interpreter.TensorHandle(bits, tl.bfloat16)
        return interpreted_cast(self, src, dst_type)

    builder.create_dot, builder.cast_impl = dot, cast


if DEVICE == "cpu":
    _correct_the_interpreter()

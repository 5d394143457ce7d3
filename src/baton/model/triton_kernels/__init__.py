"""Kernels for NVIDIA GPUs, in Triton: device code only. Import it on first use, not at start.

`ops` next to them is how the rest of `model` calls them, on tensors. Every kernel computes a row
(a token, or a token's head) by itself and in one order of summation, so that its bits do not
depend on which other rows there are. They run on Triton from 3.6 on, and on the CPU in its
interpreter (`TRITON_INTERPRET=1`, set before the first import of triton).
"""

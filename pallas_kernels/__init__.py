"""Kernels over plain arrays; needs only jax.

`int4_matmul` multiplies with packed group-wise codes, `gptq_block` runs the inner loop of the solver.
"""

from pallas_kernels.gptq_block import gptq_block
from pallas_kernels.matmul import int4_matmul

__all__ = ["gptq_block", "int4_matmul"]

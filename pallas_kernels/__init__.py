"""Kernels over plain arrays; needs only jax.

`int4_matmul` multiplies with packed group-wise codes, `gptq_block` runs the inner loop of the solver, on grids that
are `Given` or `Searched` on the way.
"""

from pallas_kernels.gptq_block.interface import gptq_block
from pallas_kernels.gptq_block.reference import Arithmetic, BlockResult, Given, Search, Searched
from pallas_kernels.int4_matmul.interface import int4_matmul

__all__ = ["Arithmetic", "BlockResult", "Given", "Search", "Searched", "gptq_block", "int4_matmul"]

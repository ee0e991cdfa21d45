"""Kernels over plain arrays; needs only jax.

`int4_matmul` and `int4_matmul_runtime` multiply with packed group-wise codes, in the layout of GPTQ files and in that of the GPU
kernels. `gptq_block` is the inner loop of the solver, on grids that are `Given` or `Searched`.
"""

from pallas_kernels.backends import Backend
from pallas_kernels.gptq_block.interface import MOST_ROWS, gptq_block
from pallas_kernels.gptq_block.operands import Arithmetic, BlockResult, Given, Search, Searched
from pallas_kernels.gptq_block.reference import PLAIN
from pallas_kernels.int4_matmul.int4_rows import Int4RowsKernel, to_int4_rows
from pallas_kernels.int4_matmul.interface import int4_matmul, int4_matmul_runtime
from pallas_kernels.int4_matmul.planes import RuntimeKernel, dequantize_runtime, to_runtime

__all__ = [
    "MOST_ROWS",
    "PLAIN",
    "Arithmetic",
    "Backend",
    "BlockResult",
    "Given",
    "Int4RowsKernel",
    "RuntimeKernel",
    "Search",
    "Searched",
    "dequantize_runtime",
    "gptq_block",
    "int4_matmul",
    "int4_matmul_runtime",
    "to_int4_rows",
    "to_runtime",
]

"""Inline PTX in Triton kernels, for operations that Pallas has no name for."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as gpu


def elementwise(assembly: str, constraints: str, args: list[jax.Array]) -> jax.Array:
    """The float32 results of a piece of PTX; its operands are `$1` and so on, its result is `$0`."""
    shape = jax.ShapeDtypeStruct(args[0].shape, jnp.float32)
    return gpu.elementwise_inline_asm(assembly, args=args, constraints=constraints, pack=1, result_shape_dtypes=[shape])[0]

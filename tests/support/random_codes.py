"""Random packed kernels, and in float64 what they must expand to."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import RuntimeKernel, to_runtime
from pallas_kernels.int4_matmul.shapes import Shape
from pallas_kernels.packing import pack_codes

TOLERANCE = {"bfloat16": 2**-8, "float16": 2**-10, "float32": 2e-6}
"""The rounding of a result and of the kernel in each dtype."""


class Case(NamedTuple):
    """Arrays in the file layout, settings, and the kernel by the invariant's own words."""

    arrays: tuple  # qweight, scales, zeros, group_index
    group_size: int
    bits: int
    w_kn: np.ndarray

    @property
    def kernel(self) -> RuntimeKernel:
        return to_runtime(*self.arrays, group_size=self.group_size, bits=self.bits)


def case(k: int, n: int, group_size: int, *, bits: int = 4, sym: bool = True, reordered: bool = False, seed: int = 0) -> Case:
    """Codes, float16 scales, zero points and groups, all random."""
    random = np.random.default_rng(seed)
    groups = k // group_size
    codes = random.integers(0, 2**bits, (k, n))
    scales = random.uniform(0.01, 0.05, (groups, n)).astype(np.float16)
    zeros = np.full((groups, n), 2 ** (bits - 1)) if sym else random.integers(0, 2**bits, (groups, n))
    group_index = random.permutation(np.arange(k) // group_size) if reordered else np.arange(k) // group_size
    arrays = (
        pack_codes(jnp.asarray(codes), bits),
        jnp.asarray(scales),
        None if sym else pack_codes(jnp.asarray(zeros).T, bits).T,
        jnp.asarray(group_index, jnp.int32) if reordered else None,
    )
    return Case(arrays, group_size, bits, scales.astype(np.float64)[group_index] * (codes - zeros[group_index]))


def case_of(shape: Shape, seed: int = 0) -> Case:
    """The kernel of a shape."""
    return case(shape.k, shape.n, shape.group_size, bits=shape.bits, sym=shape.sym, reordered=shape.reordered, seed=seed)


def random_rows(m: int, k: int, dtype: str = "float32", seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((m, k)), dtype)


def excess(y: jax.Array, x: jax.Array, w_kn: np.ndarray) -> float:
    """The largest error of `y` as `x @ w_kn`, as a fraction of what rounding allows: at most 1 where the product is right.

    Allowed is the rounding of the result and of the kernel in the dtype of x, relative to the root of the sum of squared
    products.
    """
    x_mk = np.asarray(x, np.float64)
    expected = x_mk @ w_kn
    tolerance = TOLERANCE[str(x.dtype)]
    allowed = tolerance * np.sqrt(np.square(x_mk) @ np.square(w_kn)) * 2 + tolerance * np.abs(expected)
    return float(np.max(np.abs(np.asarray(y, np.float64) - expected) / allowed))

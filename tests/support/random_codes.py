"""Random packed kernels, and in float64 what they must expand to."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import pack_codes


class Case(NamedTuple):
    """Arrays in the file layout, settings, and the kernel by the invariant's own words."""

    arrays: tuple  # qweight, scales, zeros, order
    group_size: int
    bits: int
    w_kn: np.ndarray


def case(k: int, n: int, group_size: int, *, bits: int = 4, sym: bool = True, ordered: bool = False, seed: int = 0) -> Case:
    """Codes, float16 scales, zero points and groups, all random."""
    random = np.random.default_rng(seed)
    groups = k // group_size
    codes = random.integers(0, 2**bits, (k, n))
    scales = random.uniform(0.01, 0.05, (groups, n)).astype(np.float16)
    zeros = np.full((groups, n), 2 ** (bits - 1)) if sym else random.integers(0, 2**bits, (groups, n))
    order = random.permutation(np.arange(k) // group_size) if ordered else np.arange(k) // group_size
    arrays = (
        pack_codes(jnp.asarray(codes), bits),
        jnp.asarray(scales),
        None if sym else pack_codes(jnp.asarray(zeros).T, bits).T,
        jnp.asarray(order, jnp.int32) if ordered else None,
    )
    return Case(arrays, group_size, bits, scales.astype(np.float64)[order] * (codes - zeros[order]))

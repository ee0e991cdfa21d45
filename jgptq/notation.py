"""The letters used for axes, everywhere; variables carry theirs as a suffix (`w_kn`, `h_kk`, `scale_gn`).

    K  in-features of a linear, the contracted axis        B  rows of K in one solver block
    N  out-features                                        R  rows of K in one inner step of a block
    G  groups of rows, K / group_size                      T  tokens
    D  model width                                         V  vocabulary
    S  positions in a sequence                             L  decoder blocks
    H  heads, J key-value heads, F features of one head

A kernel is `[K, N]` as in Flax; the papers write `W = kernel.T`, so that their columns are our rows of K.
"""

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

Array = jax.Array | np.ndarray
"""What a room accepts as an array: on a device, in host memory, or mapped from a file."""

__all__ = ["Array", "Bool", "Float", "Int", "UInt8"]

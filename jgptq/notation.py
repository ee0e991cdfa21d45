"""The letters used for axes; variables carry theirs as a suffix (`w_kn`, `h_kk`, `scale_gn`), annotations spell them in full.

    K  in-features of a linear, the contracted axis        N  out-features of a linear
    G  groups of in-features that share a scale            T  tokens
    b  samples in a batch                                  S  positions in a sequence
    D  width of the residual stream                        V  vocabulary
    H  query heads                                         J  key-value heads
    F  features of one head                                g  query heads that share a key-value head
    L  decoder blocks                                      E  experts, or other problems solved at once
    k  experts that a token goes to

In mixtures of experts, P are rows that are sorted by expert, C the blocks of B that they fill. In latent attention, R is the
width of the vector that keys and values come from.

In `jgptq/models/attention.py`, C are the queries of one chunk and M the keys that they may attend to. Elsewhere M is the number
of rows of x in a product, or the out-features of a second linear.

In `jgptq/solver` and `pallas_kernels` runs of in-features have letters of their own:

    B  rows in one block of the loop                       R  rows in any other run: a group, a block as a kernel sees it
    S  rows in one step inside a block                     C  blocks, K / B; on a mesh, the columns that one device holds
    P  K with padding; in sums over tokens, one panel      Q  D with padding; in sums over tokens, another panel

A kernel is `[K, N]` as in Flax; the papers write `W = kernel.T`, so their columns are our rows of K.
"""

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

Array = jax.Array | np.ndarray
"""What functions accept as an array: on a device, in host memory, or mapped from a file."""

__all__ = ["Array", "Bool", "Float", "Int", "UInt8"]

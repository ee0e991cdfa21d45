"""Words of one code, and 4-bit codes in another order: what formats need besides `pallas_kernels.packing`."""

import numpy as np


def constant_words(code: int, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """The words `[G, N*bits/32]` of a matrix `[G, N]` of one code, packed along N."""
    stream = sum(code << bits * j for j in range(32))
    words = np.frombuffer(stream.to_bytes(4 * bits, "little"), np.int32)
    return np.tile(words, (shape[0], shape[1] // 32))

"""The file layout of packed codes: a dense stream of bits, least significant first, in int32 words along the first axis.

Code `j` of a column occupies bits `[j*bits, (j+1)*bits)` of that column's stream, and bit `i` of the stream is bit `i % 32`
of word `i // 32`. Widths that divide 32 fill every word with whole codes; at 3 bits 32 codes fill three words, and two of them
straddle two words.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def unit(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole words, and how many words: after them the pattern repeats."""
    return 32 // math.gcd(bits, 32), bits // math.gcd(bits, 32)


def _positions(bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each code of a unit: the word of its lowest bit, the shift in that word, and whether it runs into the next word."""
    first_bit = np.arange(unit(bits)[0]) * bits
    word, shift = first_bit // 32, first_bit % 32
    return word, shift, shift + bits > 32


def pack_codes(codes: jax.Array, bits: int) -> jax.Array:
    """Packs unsigned codes into int32 words along the first axis.

    Args:
      codes: integers in `[0, 2^bits)`, `[K, ...]`, K a multiple of the codes in a unit.
      bits: width of a code, 1 to 32.

    Returns:
      int32 `[K*bits/32, ...]`; `unpack_codes` is its exact inverse.
    """
    k, rest = codes.shape[0], codes.shape[1:]
    size, width = unit(bits)
    units = codes.astype(jnp.uint32).reshape(k // size, size, *rest)
    words = [jnp.zeros((k // size, *rest), jnp.uint32) for _ in range(width)]
    for j, (word, shift, straddles) in enumerate(zip(*_positions(bits), strict=True)):
        words[word] |= units[:, j] << np.uint32(shift)
        if straddles:
            words[word + 1] |= units[:, j] >> np.uint32(32 - shift)
    packed = jnp.stack(words, axis=1).reshape(k * bits // 32, *rest)
    return jax.lax.bitcast_convert_type(packed, jnp.int32)


def unpack_codes(words: jax.Array, bits: int) -> jax.Array:
    """Unpacks int32 words along the first axis into codes.

    Args:
      words: int32 `[K*bits/32, ...]`, as `pack_codes` makes them.
      bits: width of a code.

    Returns:
      int32 codes in `[0, 2^bits)`, `[K, ...]`.
    """
    rows, rest = words.shape[0], words.shape[1:]
    size, width = unit(bits)
    units = jax.lax.bitcast_convert_type(words, jnp.uint32).reshape(rows // width, width, *rest)
    word, shift, straddles = _positions(bits)
    expand = (1, size) + (1,) * len(rest)
    low = units[:, word] >> shift.astype(np.uint32).reshape(expand)
    high_word = np.where(straddles, word + 1, word)
    high_shift = np.where(straddles, 32 - shift, 0).astype(np.uint32).reshape(expand)
    high = jnp.where(straddles.reshape(expand), units[:, high_word] << high_shift, np.uint32(0))
    codes = (low | high) & np.uint32(2**bits - 1)
    return codes.astype(jnp.int32).reshape(rows * 32 // bits, *rest)

"""The packed tensor and its layout: exact inverses, whatever the codes."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jgptq.errors import CheckpointError
from jgptq.models.packed import PackedTensor, pack, unpack, validate
from pallas_kernels import int4_matmul
from pallas_kernels.packing import pack_codes, unpack_codes

BITS = (2, 3, 4, 8)


def random_packed(bits: int, k: int, n: int, group_size: int, sym: bool, seed: int) -> tuple[PackedTensor, np.ndarray]:
    """A packed tensor and what it must expand to, by the invariant's own words."""
    random = np.random.default_rng(seed)
    rows = k if group_size == -1 else group_size
    codes = random.integers(0, 2**bits, (k, n))
    scales = random.uniform(0.001, 0.1, (k // rows, n)).astype(np.float16)
    zeros = None if sym else random.integers(0, 2**bits, (k // rows, n))
    middle = np.full((k // rows, n), 2 ** (bits - 1)) if zeros is None else zeros
    group = np.arange(k) // rows
    expected = scales.astype(np.float64)[group] * (codes - middle[group])
    zero_gn = None if zeros is None else jnp.asarray(zeros)
    return pack(jnp.asarray(codes), jnp.asarray(scales), zero_gn, bits=bits, group_size=group_size), expected


@given(st.sampled_from(BITS), st.integers(0, 2**32 - 1))
def test_unpacking_inverts_packing(bits: int, seed: int):
    units, columns = 3, 5
    codes = np.random.default_rng(seed).integers(0, 2**bits, (32 * units, columns))
    words = pack_codes(jnp.asarray(codes), bits)
    assert words.shape == (units * bits, columns)
    assert words.dtype == jnp.int32
    np.testing.assert_array_equal(unpack_codes(words, bits), codes)


@given(st.sampled_from(BITS), st.integers(0, 2**32 - 1))
def test_words_are_one_dense_stream_of_bits_from_the_lowest(bits: int, seed: int):
    codes = np.random.default_rng(seed).integers(0, 2**bits, 64)
    stream = sum(int(code) << (bits * j) for j, code in enumerate(codes))
    words = np.asarray(pack_codes(jnp.asarray(codes)[:, None], bits))[:, 0].view(np.uint32)
    assert [stream >> (32 * i) & 0xFFFFFFFF for i in range(len(words))] == words.tolist()


def test_three_bit_codes_that_straddle_words_lie_where_the_format_says():
    codes = np.zeros((32, 1), np.int32)
    codes[10] = 0b111
    words = np.asarray(pack_codes(jnp.asarray(codes), 3))[:, 0].view(np.uint32)
    assert [hex(word) for word in words] == ["0xc0000000", "0x1", "0x0"]
    codes[10], codes[21] = 0, 0b111
    words = np.asarray(pack_codes(jnp.asarray(codes), 3))[:, 0].view(np.uint32)
    assert [hex(word) for word in words] == ["0x0", "0x80000000", "0x3"]


@given(st.sampled_from(BITS), st.sampled_from([-1, 32, 64, 128]), st.booleans(), st.integers(0, 1000))
def test_dequantize_is_the_invariant_exactly(bits: int, group_size: int, sym: bool, seed: int):
    packed, expected = random_packed(bits, 128, 32, group_size, sym, seed)
    validate(packed, "w")
    np.testing.assert_array_equal(np.asarray(packed.dequantize(), np.float64), expected)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_matmul_is_the_product_with_the_expanded_kernel(bits: int, sym: bool):
    packed, expected = random_packed(bits, 64, 32, 32, sym, 0)
    x = np.random.default_rng(1).normal(size=(2, 3, 64)).astype(np.float32)
    y = packed.matmul(jnp.asarray(x))
    assert y.shape == (2, 3, 32)
    np.testing.assert_allclose(y, x.astype(np.float64) @ expected, rtol=1e-5, atol=1e-5)
    assert packed.matmul(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_rows_may_belong_to_any_group():
    packed, _ = random_packed(4, 64, 32, 32, False, 2)
    order = np.random.default_rng(3).integers(0, 2, 64).astype(np.int32)
    codes, zeros = (np.asarray(part) for part in unpack(packed))
    expected = np.asarray(packed.scales, np.float64)[order] * (codes - zeros[order])
    x = np.eye(64, dtype=np.float32)
    parts = (jnp.asarray(packed.qweight), jnp.asarray(packed.scales), jnp.asarray(packed.zeros))
    product = int4_matmul(jnp.asarray(x), *parts, group_size=32, group_index=jnp.asarray(order))
    np.testing.assert_allclose(product, expected, rtol=1e-6)


def test_validate_names_every_part_that_contradicts_the_others():
    packed, _ = random_packed(4, 64, 32, 32, False, 4)
    broken = PackedTensor(
        qweight=packed.qweight[:4],
        scales=packed.scales.astype(jnp.int32),
        zeros=packed.zeros,
        bits=4,
        group_size=32,
        shape=(64, 32),
    )
    with pytest.raises(CheckpointError, match=r"(?s)^layer: qweight must be int32 \[8, 32\].*scales must be float16"):
        validate(broken, "layer")


def test_nbytes_counts_codes_scales_and_zeros():
    packed, _ = random_packed(4, 64, 32, 32, False, 5)
    assert packed.nbytes == 64 * 32 // 2 + 2 * 32 * 2 + 2 * 32 // 2

"""The assembly of the Triton kernels, run instruction by instruction: what interpret mode replaces with plain arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import ptx
import pytest

from jgptq.solver.codes.grid import search_grid
from pallas_kernels.assembly import gpu
from pallas_kernels.gptq_block.reference import PLAIN
from pallas_kernels.gptq_block.triton import EXACT
from pallas_kernels.int4_matmul import triton


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setattr(gpu, "elementwise_inline_asm", ptx.elementwise_inline_asm)


@pytest.fixture
def words() -> np.ndarray:
    """Words of every kind, neighbours that differ; among them all bits and none."""
    random_words = np.random.default_rng(0).integers(-(2**31), 2**31, (8, 16), np.int64).astype(np.int32)
    random_words[0, :2] = 0, -1
    return random_words


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("bits", "plane"), [(bits, plane) for bits in (4, 8) for plane in range(32 // bits)])
def test_the_codes_of_a_plane_are_those_of_plain_arithmetic(bits: int, plane: int, dtype: str, words):
    codes = triton.codes(jnp.asarray(words), plane, bits, jnp.dtype(dtype), interpret=False)
    wanted = (words.view(np.uint32) >> np.uint32(bits * plane) & np.uint32(2**bits - 1)).astype(np.int64) - 2 ** (bits - 1)
    np.testing.assert_array_equal(np.asarray(codes, np.float64), wanted)
    assert codes.dtype == jnp.dtype(dtype)


@pytest.mark.parametrize(("bits", "plane"), [(bits, plane) for bits in (4, 8) for plane in range(32 // bits)])
def test_wide_codes_are_those_of_plain_arithmetic(bits: int, plane: int, words):
    codes = triton.wide_codes(jnp.asarray(words), plane, bits, interpret=False)
    wanted = (words.view(np.uint32) >> np.uint32(bits * plane) & np.uint32(2**bits - 1)).astype(np.int64) - 2 ** (bits - 1)
    np.testing.assert_array_equal(codes, wanted.astype(np.float32))


def test_single_operations_take_their_operands_in_order():
    random = np.random.default_rng(1)
    a, b, c = (random.standard_normal((4, 8), np.float32) for _ in range(3))
    exact = a.astype(np.float64) * b + c
    np.testing.assert_array_equal(triton._fused(a, b, c, interpret=False), exact.astype(np.float32))
    np.testing.assert_array_equal(EXACT.divide(a, b), a / b)
    halves = np.arange(-8, 8, dtype=np.float32)[None] + np.float32(0.5)
    np.testing.assert_array_equal(EXACT.round(halves), np.asarray(jnp.round(halves)))


@pytest.mark.parametrize("scale", ["minmax", "mse", "hessian"])
@pytest.mark.parametrize("sym", [True, False])
def test_the_search_of_grids_in_assembly_finds_what_plain_arithmetic_finds(sym: bool, scale: str):
    random = np.random.default_rng(2)
    w_rn, weight_r = (jnp.asarray(part, jnp.float32) for part in (random.standard_normal((32, 3)), random.lognormal(size=32)))
    with jax.disable_jit():  # assembly runs on numbers
        of_kernel, plain = (
            search_grid(w_rn, weight_r, bits=3, sym=sym, scale=scale, arithmetic=arithmetic) for arithmetic in (EXACT, PLAIN)
        )
    np.testing.assert_array_equal(of_kernel.scale_n, plain.scale_n)
    np.testing.assert_array_equal(of_kernel.zero_n, plain.zero_n)

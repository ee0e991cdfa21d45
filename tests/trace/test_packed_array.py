"""A packed array in place of a float one: its shape, its entries, and the functions that take it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jgptq
from jgptq.models.packed import PackedTensor, pack
from jgptq.trace.layout import Layout
from jgptq.trace.packed_array import PackedArray, stacked


def packed(seed: int) -> PackedTensor:
    random = np.random.default_rng(seed)
    codes = jnp.asarray(random.integers(0, 16, (64, 96)), jnp.uint8)
    scales = jnp.asarray(random.uniform(0.5, 1.5, (2, 96)), jnp.float16)
    return pack(codes, scales, bits=4, group_size=32)


HEADS = Layout((96, 8, 8)).transposed(2, 1, 0).reshaped(64, 96)
ONE = PackedArray(packed=packed(0), layout=HEADS, dtype=np.dtype(np.float32))
STACK = PackedArray(
    packed=stacked([packed(seed) for seed in range(6)], (2, 3)), layout=Layout((64, 96)), dtype=np.dtype(jnp.bfloat16)
)
X = jnp.asarray(np.random.default_rng(9).normal(size=(5, 8)), jnp.float32)


def test_the_array_has_the_entries_of_the_matrix_in_its_own_shape():
    matrix = np.asarray(ONE.packed.dequantize())
    np.testing.assert_array_equal(np.asarray(ONE), matrix.reshape(8, 8, 96).transpose(2, 1, 0))
    assert (ONE.shape, ONE.ndim, ONE.size, ONE.dtype) == ((96, 8, 8), 3, 64 * 96, np.float32)
    assert ONE.nbytes == ONE.packed.nbytes < ONE.size


def test_stacked_layers_are_those_of_single_ones():
    assert (STACK.shape, STACK.dtype) == ((2, 3, 64, 96), jnp.bfloat16)
    layers = np.asarray(STACK, np.float32)
    for index in range(6):
        expected = packed(index).dequantize().astype(jnp.bfloat16)
        np.testing.assert_array_equal(layers[divmod(index, 3)], np.asarray(expected, np.float32))


FLOAT = ONE.dequantize()
USES = {
    "einsum": lambda w: jnp.einsum("xi,nji->xnj", X, w),
    "tensordot": lambda w: jnp.tensordot(X, w, ((1,), (1,))),
    "asarray": lambda w: jnp.asarray(w, jnp.bfloat16),
    "astype": lambda w: w.astype(jnp.bfloat16),
    "matmul": lambda w: X @ w.transpose(0, 2, 1),
    "operator": lambda w: w @ X.T,
    "reflected operator": lambda w: jnp.ones((96, 2, 8)) @ w,
    "reshape": lambda w: w.reshape(96, -1),
    "transposed": lambda w: w.T,
    "swapaxes": lambda w: w.swapaxes(0, 1),
    "index": lambda w: w[1],
    "everything": lambda w: w[...],
}


@pytest.mark.parametrize("use", USES)
def test_functions_read_it_as_the_float_array(use: str):
    expected = USES[use](FLOAT)
    np.testing.assert_array_equal(USES[use](ONE), expected)
    np.testing.assert_allclose(jax.jit(USES[use])(ONE), expected, rtol=1e-6)


def test_scan_slices_its_layers():
    x = jnp.ones((2, 64), jnp.bfloat16)

    def each(carry: None, row: PackedArray) -> tuple[None, jax.Array]:
        return carry, jax.lax.scan(lambda c, w: (c, jnp.dot(x, jnp.asarray(w))), carry, row)[1]

    _, outputs = jax.lax.scan(each, None, STACK)
    assert outputs.shape == (2, 3, 2, 96)
    np.testing.assert_array_equal(outputs[1, 2], jnp.dot(x, STACK.dequantize()[1, 2]))


def test_dequantized_replaces_packed_leaves_alone():
    kept = jnp.ones(3)
    tree = jgptq.dequantized({"a": ONE, "b": kept})
    np.testing.assert_array_equal(tree["a"], FLOAT)
    assert tree["b"] is kept


@pytest.mark.parametrize("seed", range(20))
def test_a_layout_is_undone(seed: int):
    random = np.random.default_rng(seed)
    layout = Layout((2, 3, 4))
    for _ in range(5):
        factors = [2, 3, 4, 2][: random.integers(1, 4)]
        shape = random.permutation([*factors[:-1], 24 // int(np.prod(factors[:-1]))])
        layout = layout.reshaped(*map(int, shape)).transposed(*map(int, random.permutation(len(shape))))
    array = np.arange(24).reshape(2, 3, 4)
    np.testing.assert_array_equal(layout.backward(layout.forward(jnp.asarray(array))), array)
    again = layout.then(layout.undone())
    np.testing.assert_array_equal(again.forward(jnp.asarray(array)), array)

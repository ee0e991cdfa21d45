"""The Mosaic GPU kernel in its interpreter, which takes the pipeline of copies and multiplies tiles in plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_codes import case

from pallas_kernels import int4_matmul
from pallas_kernels.int4_matmul import interface, mosaic
from pallas_kernels.int4_matmul.mosaic import Pipeline, pipeline_of
from pallas_kernels.int4_matmul.planes import to_runtime
from pallas_kernels.int4_matmul.rows import Rows, RowsKernel, expanded_rows, from_rows, to_rows

# Not a public name yet.
interpreter = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")


@pytest.mark.parametrize(
    ("k", "n", "group_size", "sym", "m", "parts"),
    [(512, 136, 64, False, 5, 2), (512, 64, 512, False, 33, 1), (160, 40, 32, True, 1, 1)],
)
def test_rows_are_converted_and_multiplied(k, n, group_size, sym, m, parts):
    found = case(k, n, group_size, sym=sym)
    planes = to_runtime(*found.arrays, group_size=group_size)
    kernel = to_rows(planes)
    for before, after in zip(jax.tree.leaves(planes), jax.tree.leaves(from_rows(kernel)), strict=True):
        np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(expanded_rows(kernel), found.w_kn)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((m, k)), jnp.bfloat16)
    filled = jnp.pad(x, ((0, 0), (0, planes.layout.padded_k - k)))
    parameters = interpreter.InterpretGPUParams()
    y = mosaic.product(filled, kernel, Pipeline(parts=parts), interpret=parameters)
    assert y.shape == (m, n)
    x_mk = np.asarray(x, np.float64)
    allowed = 2**-7 * (np.sqrt(np.square(x_mk) @ np.square(found.w_kn)) + np.abs(x_mk @ found.w_kn))
    assert np.all(np.abs(np.asarray(y, np.float64) - x_mk @ found.w_kn) < allowed)


def test_the_same_call_takes_rows(monkeypatch):
    found = case(160, 40, 32, sym=False, ordered=True)
    kernel = to_rows(to_runtime(*found.arrays, group_size=32))
    arrays = (kernel.codes, kernel.scales, kernel.zeros)
    known = {"group_size": 32, "order": kernel.order, "layout": kernel.layout}
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 160)), jnp.float32)
    pull = jnp.asarray(np.random.default_rng(2).standard_normal((3, 40)), jnp.float32)
    y, back = jax.vjp(lambda x: int4_matmul(x, *arrays, **known), x)
    np.testing.assert_allclose(y, np.asarray(x) @ found.w_kn, atol=1e-4)
    np.testing.assert_allclose(back(pull)[0], np.asarray(pull) @ found.w_kn.T, atol=1e-4)
    with pytest.raises(ValueError, match="backend 'mosaic' needs an NVIDIA GPU, found cpu"):
        int4_matmul(x, *arrays, **known, backend="mosaic")
    with pytest.raises(ValueError, match="reads another layout: Triton's kernels read Planes"):
        int4_matmul(x, *arrays, **known, backend="interpret")
    # On a GPU it is the kernel that runs.
    taken = []
    monkeypatch.setattr(interface, "resolve", lambda backend, unfit: backend)
    monkeypatch.setattr(mosaic, "product", lambda x, kernel: taken.append(kernel.layout) or jnp.zeros((3, 40)))
    int4_matmul(x, *arrays, **known, backend="mosaic")
    assert taken == [kernel.layout]


def test_k_is_cut_into_parts_that_divide_it():
    for k, m in ((4096, 1), (14336, 16), (384, 64), (128, 128)):
        codes, scales = (jax.ShapeDtypeStruct(shape, jnp.int4) for shape in ((128, k), (k // 128, 128)))
        layout = Rows(k=k, n=128, bits=4, group_size=128)
        kernel = RowsKernel(codes=codes, scales=scales, zeros=None, order=None, layout=layout)
        pipeline = pipeline_of(m, kernel)
        assert kernel.layout.tiles % pipeline.parts == 0
        assert pipeline.columns == (128 if m <= 64 else 64)


def test_what_the_kernel_does_not_take_is_said():
    kernel = to_rows(to_runtime(*case(128, 64, 64).arrays, group_size=64))
    with pytest.raises(ValueError, match="up to 128 rows of bfloat16 or float16, found 129 of bfloat16"):
        mosaic.product(jnp.zeros((129, 128), jnp.bfloat16), kernel)
    with pytest.raises(ValueError, match="found 1 of float32"):
        mosaic.product(jnp.zeros((1, 128), jnp.float32), kernel)
    with pytest.raises(ValueError, match="rows hold codes of 4 bits, found 8"):
        to_rows(to_runtime(*case(128, 64, 64, bits=8).arrays, group_size=64, bits=8))

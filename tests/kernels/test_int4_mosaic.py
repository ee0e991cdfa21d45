"""The Mosaic GPU kernel in its interpreter, which runs the pipeline of copies and multiplies tiles in plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_codes import case, case_of, random_rows

from pallas_kernels import Int4RowsKernel, int4_matmul_runtime, to_int4_rows
from pallas_kernels.int4_matmul import interface, mosaic
from pallas_kernels.int4_matmul.int4_rows import Int4Rows, from_int4_rows
from pallas_kernels.int4_matmul.mosaic import Pipeline, pipeline_of
from pallas_kernels.int4_matmul.shapes import shapes_of

# Not a public name yet.
interpreter = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")


@pytest.mark.parametrize("shape", shapes_of("test_mosaic"), ids=str)
def test_int4_rows_are_converted_and_multiplied(shape):
    packed = case_of(shape)
    kernel = to_int4_rows(packed.kernel)
    for before, after in zip(jax.tree.leaves(packed.kernel), jax.tree.leaves(from_int4_rows(kernel)), strict=True):
        np.testing.assert_array_equal(before, after)
    x = random_rows(shape.m, shape.k, shape.dtype)
    padded = jnp.pad(x, ((0, 0), (0, kernel.layout.padded_k - shape.k)))
    pipeline = Pipeline(split_k=2 if shape.m == 5 else 1)
    y = mosaic.product(padded, kernel, pipeline, interpret=interpreter.InterpretGPUParams())
    assert y.shape == (shape.m, shape.n)
    x_mk = np.asarray(x, np.float64)
    allowed = 2**-7 * (np.sqrt(np.square(x_mk) @ np.square(packed.w_kn)) + np.abs(x_mk @ packed.w_kn))
    assert np.all(np.abs(np.asarray(y, np.float64) - x_mk @ packed.w_kn) < allowed)


def test_the_same_call_takes_int4_rows(monkeypatch):
    packed = case(160, 40, 32, sym=False, reordered=True)
    kernel = to_int4_rows(packed.kernel)
    x, cotangent = random_rows(3, 160), random_rows(3, 40, seed=2)
    y, back = jax.vjp(lambda x: int4_matmul_runtime(x, kernel), x)
    np.testing.assert_allclose(y, np.asarray(x) @ packed.w_kn, atol=1e-4)
    np.testing.assert_allclose(back(cotangent)[0], np.asarray(cotangent) @ packed.w_kn.T, atol=1e-4)
    with pytest.raises(ValueError, match="backend 'mosaic' needs an NVIDIA GPU, found cpu"):
        int4_matmul_runtime(x, kernel, backend="mosaic")
    with pytest.raises(ValueError, match="reads another layout: Triton's kernels read a RuntimeKernel"):
        int4_matmul_runtime(x, kernel, backend="interpret")
    with pytest.raises(ValueError, match="those of Mosaic GPU an Int4RowsKernel"):
        int4_matmul_runtime(x, packed.kernel, backend="mosaic")
    # On a GPU it is the kernel that runs.
    taken = []
    monkeypatch.setattr(interface, "resolve", lambda backend, unfit: backend)
    monkeypatch.setattr(mosaic, "product", lambda x, kernel: taken.append(kernel.layout) or jnp.zeros((3, 40)))
    int4_matmul_runtime(x, kernel, backend="mosaic")
    assert taken == [kernel.layout]


def test_k_is_cut_into_parts_that_divide_it():
    for k, m in ((4096, 1), (14336, 16), (384, 64), (128, 128)):
        codes, scales = (jax.ShapeDtypeStruct(shape, jnp.int4) for shape in ((128, k), (k // 128, 128)))
        layout = Int4Rows(k=k, n=128, bits=4, group_size=128)
        kernel = Int4RowsKernel(codes=codes, scales=scales, zeros=None, row_order=None, layout=layout)
        pipeline = pipeline_of(m, kernel)
        assert kernel.layout.tiles % pipeline.split_k == 0
        assert pipeline.block_n == (128 if m <= 64 else 64)


def test_what_the_kernel_does_not_take_is_said():
    kernel = to_int4_rows(case(128, 64, 64).kernel)
    with pytest.raises(ValueError, match="up to 128 rows of bfloat16 or float16, found 129 of bfloat16"):
        mosaic.product(jnp.zeros((129, 128), jnp.bfloat16), kernel)
    with pytest.raises(ValueError, match="found 1 of float32"):
        mosaic.product(jnp.zeros((1, 128), jnp.float32), kernel)
    with pytest.raises(ValueError, match="int4 rows hold codes of 4 bits, found 8"):
        to_int4_rows(case(128, 64, 64, bits=8).kernel)

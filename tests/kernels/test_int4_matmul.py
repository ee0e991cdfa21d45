"""Products with packed codes against a float64 oracle: the runtime layout, the kernels in Pallas' interpreter, and plain JAX."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_codes import case, case_of, excess, random_rows

from pallas_kernels import backends, int4_matmul, int4_matmul_runtime, to_runtime
from pallas_kernels.int4_matmul import triton
from pallas_kernels.int4_matmul.planes import Planes, dequantize_runtime, fuse, to_file
from pallas_kernels.int4_matmul.shapes import shapes_of
from pallas_kernels.int4_matmul.triton import Tiling


def assert_is_product(y: jax.Array, x: jax.Array, w_kn: np.ndarray) -> None:
    """To the rounding of the result and of the kernel in the dtype of x."""
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], w_kn.shape[1])
    assert excess(y, x, w_kn) <= 1


@settings(max_examples=6)
@given(
    st.sampled_from([4, 8]),
    st.sampled_from([(32, 32), (64, 32), (160, 160), (160, 32), (192, 96), (256, 128), (384, 128), (512, 256), (320, 64)]),
    st.sampled_from([8, 40, 64, 136]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_the_runtime_layout_holds_what_the_file_layout_does(bits, sizes, n, sym, reordered, seed):
    packed = case(sizes[0], n, sizes[1], bits=bits, sym=sym, reordered=reordered, seed=seed)
    kernel = packed.kernel
    for before, after in zip(packed.arrays, to_file(kernel), strict=True):
        assert (before is None) == (after is None)
        if before is not None:
            assert before.dtype == after.dtype
            np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(dequantize_runtime(kernel), packed.w_kn)


def test_the_words_lie_where_the_layout_says():
    codes = np.random.default_rng(0).integers(0, 16, (256, 8))
    packed = case(256, 8, 128)
    words = np.asarray(to_runtime(jnp.asarray(_words(codes)), packed.arrays[1], group_size=128).qweight).view(np.uint32)
    for k in (0, 1, 15, 16, 127, 128, 200, 255):
        tile, plane, row = k // 128, k % 128 // 16, k % 16
        assert words[16 * tile + row, 3] >> (4 * plane) & 15 == codes[k, 3]


def _words(codes: np.ndarray) -> np.ndarray:
    """The file layout of 4-bit codes, in numpy."""
    return sum(codes[i::8].astype(np.uint32) << np.uint32(4 * i) for i in range(8)).view(np.int32)


@pytest.mark.parametrize("shape", shapes_of("test"), ids=str)
@pytest.mark.parametrize("backend", ["interpret", "jax"])
def test_products_are_those_of_the_oracle(shape, backend):
    packed, x = case_of(shape), random_rows(shape.m, shape.k, shape.dtype)
    assert_is_product(int4_matmul_runtime(x, packed.kernel, backend=backend), x, packed.w_kn)


@pytest.mark.parametrize(
    ("backend", "m", "k", "n", "group_size"), [("jax", 129, 1536, 640, 96), ("interpret", 257, 128, 64, 128)]
)
def test_a_compiled_product_runs_where_x_is_permuted(backend, m, k, n, group_size):
    # XLA has compiled the product of a permuted bfloat16 x of these shapes for a CPU as something that it cannot run.
    packed, x = case(k, n, group_size, sym=False, reordered=True), random_rows(m, k, "bfloat16")
    y = jax.jit(lambda x, kernel: int4_matmul_runtime(x, kernel, backend=backend))(x, packed.kernel)
    assert_is_product(y, x, packed.w_kn)


FORMS = {
    "gemv": Tiling(form="gemv", block_m=4, block_n=64, split_k=2, num_warps=4, num_stages=2),
    "gemv of one row": Tiling(form="gemv", block_m=1, block_n=64, split_k=1, num_warps=4, num_stages=2),
    "planes": Tiling(form="planes", block_m=16, block_n=64, split_k=4, num_warps=4, num_stages=2),
    "swapped": Tiling(form="swapped", block_m=32, block_n=64, split_k=2, num_warps=4, num_stages=2),
    "atomics": Tiling(form="planes", block_m=16, block_n=64, split_k=4, num_warps=4, num_stages=2, atomics=True),
}


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 256])
def test_every_form_of_the_kernel_multiplies(form, bits, group_size):
    packed = case(512, 128, group_size, bits=bits, sym=False)
    kernel, x = packed.kernel, random_rows(5, 512)
    y = triton.product(x, kernel, FORMS[form], interpret=True)
    assert_is_product(y, x, packed.w_kn)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_file_layout_runs_at_every_width(bits):
    packed = case(192, 64, 64, bits=bits, sym=False, reordered=True)
    qweight, scales, zeros, group_index = packed.arrays
    x = random_rows(7, 192)
    y = int4_matmul(x, qweight, scales, zeros, group_size=64, group_index=group_index, bits=bits)
    assert_is_product(y, x, packed.w_kn)


@pytest.mark.parametrize("backend", ["interpret", "jax"])
def test_the_gradient_of_x_is_the_transposed_product(backend):
    packed = case(192, 72, 96, sym=False, reordered=True)
    kernel, x = packed.kernel, random_rows(6, 192).reshape(2, 3, 192)
    cotangent = random_rows(6, 72, seed=2).reshape(2, 3, 72)
    y, back = jax.vjp(lambda x: int4_matmul_runtime(x, kernel, backend=backend), x)
    assert_is_product(y, x, packed.w_kn)
    assert_is_product(back(cotangent)[0], cotangent, packed.w_kn.T)


def test_the_gradient_of_the_scales_is_that_of_the_dequantized_kernel():
    packed, x = case(64, 16, 32, sym=False), random_rows(5, 64)
    qweight, scales, zeros, _ = packed.arrays
    cotangent = random_rows(5, 16, seed=2)
    multiplied = lambda scales: int4_matmul(x, qweight, scales, zeros, group_size=32)  # noqa: E731
    gradient = jax.vjp(multiplied, scales.astype(jnp.float32))[1](cotangent)[0]
    steps_kn = packed.w_kn / np.asarray(scales, np.float64)[np.arange(64) // 32]
    product_kn = np.asarray(x, np.float64).T @ np.asarray(cotangent, np.float64) * steps_kn
    np.testing.assert_allclose(gradient, product_kn.reshape(2, 32, 16).sum(axis=1), rtol=1e-4, atol=1e-3)


def test_vmap_gives_the_product_of_every_item():
    packed = case(128, 64, 64, sym=False)
    kernel, x = packed.kernel, random_rows(6, 128).reshape(3, 2, 128)
    y = jax.vmap(lambda x: int4_matmul_runtime(x, kernel, backend="interpret"))(x)
    assert_is_product(y, x, packed.w_kn)
    other = case(128, 64, 64, sym=False, seed=5)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), kernel, other.kernel)
    y = jax.vmap(lambda kernel, x: int4_matmul_runtime(x, kernel, backend="interpret"))(both, x[:2])
    for index, one in enumerate((packed, other)):
        assert_is_product(y[index], x[index], one.w_kn)


def test_a_fused_kernel_gives_the_outputs_of_its_parts_in_sequence():
    parts = [case(128, n, 64, sym=False, seed=n) for n in (40, 8, 72)]
    fused, x = fuse([part.kernel for part in parts]), random_rows(4, 128)
    assert fused.layout.n == 120
    w_kn = np.concatenate([part.w_kn for part in parts], axis=1)
    assert_is_product(int4_matmul_runtime(x, fused, backend="interpret"), x, w_kn)
    with pytest.raises(ValueError, match=r"must agree in \(K, bits, group_size, symmetric\)"):
        fuse([parts[0].kernel, case(128, 40, 32, sym=False).kernel])
    with pytest.raises(ValueError, match="same order"):
        fuse([case(128, 40, 32, reordered=True, seed=seed).kernel for seed in (1, 2)])


def test_eight_devices_multiply_with_their_columns_under_shard_map(tmp_path: Path):
    program = Path(__file__).parents[1] / "support" / "matmul_on_mesh.py"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    ran = subprocess.run(
        [sys.executable, str(program)], env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["columns", "rows"]


def test_what_does_not_agree_is_named():
    packed = case(256, 64, 64, sym=False)
    kernel, x = packed.kernel, random_rows(3, 256)
    qweight, scales, zeros, _ = packed.arrays
    with pytest.raises(ValueError, match=r"scales must be \[4, 64\] for x \[3, 256\], found \[3, 64\]; zeros must be \[4, 8\]"):
        int4_matmul(x, qweight, scales[:3], zeros[:, :4], group_size=64)
    with pytest.raises(ValueError, match=r"qweight must be \[24, 64\] for x \[3, 192\], found \[32, 64\]"):
        int4_matmul(random_rows(3, 192), qweight, scales, group_size=64)
    with pytest.raises(ValueError, match="group_size must be a multiple of 32 that divides K = 256, or K itself, found 96"):
        int4_matmul(x, qweight, scales, group_size=96)
    with pytest.raises(ValueError, match=r"x must be \[..., 256\] for this kernel, found \[3, 128\]"):
        int4_matmul_runtime(random_rows(3, 128), kernel, backend="jax")
    with pytest.raises(ValueError, match="runtime layout version 7 is unknown, this release has version 1; convert"):
        dataclasses.replace(kernel.layout, version=7)
    with pytest.raises(ValueError, match="holds codes of"):
        Planes(k=256, n=64, bits=3, group_size=64)
    with pytest.raises(ValueError, match="x must be bfloat16, float16 or float32, found int32"):
        int4_matmul_runtime(x.astype(jnp.int32), kernel, backend="jax")
    with pytest.raises(ValueError, match=r"backend must be one of .*'triton'.*, found 'cuda'"):
        int4_matmul_runtime(x, kernel, backend="cuda")
    with pytest.raises(ValueError, match=r"bits must be one of \(2, 3, 4, 8\), found 5"):
        int4_matmul(x, qweight, scales, group_size=64, bits=5)
    with pytest.raises(ValueError, match=r"scales must be \[4, 64\] for x \[3, 256\], found \[2, 64\]"):
        int4_matmul_runtime(x, dataclasses.replace(kernel, scales=kernel.scales[:2]), backend="jax")
    with pytest.raises(ValueError, match=r"group_index must be \[256\] for x \[3, 256\], found \[255\]"):
        int4_matmul(x, qweight, scales, zeros, group_size=64, group_index=jnp.zeros(255, jnp.int32))
    with pytest.raises(ValueError, match="group_index must give every group 64 rows"):
        to_runtime(qweight, scales, zeros, jnp.zeros(256, jnp.int32), group_size=64)


class _Device:
    """What is read of a device."""

    def __init__(self, platform: str, kind: str, capability: str):
        self.platform, self.device_kind, self.compute_capability = platform, kind, capability


@pytest.mark.parametrize(
    ("gpu", "reason"),
    [
        (_Device("gpu", "NVIDIA H200", "9.0"), None),
        (_Device("gpu", "Tesla V100", "7.0"), "needs compute capability 8.0, Tesla V100 has 7.0"),
        (_Device("gpu", "AMD Instinct", "gfx942"), "needs an NVIDIA GPU, found AMD Instinct"),
        (_Device("cpu", "cpu", ""), "needs an NVIDIA GPU, found cpu"),
    ],
)
def test_a_device_that_cannot_run_the_kernels_runs_plain_jax_and_says_why_when_asked_for(gpu, reason, monkeypatch):
    monkeypatch.setattr(backends.jax, "devices", lambda: [gpu])
    assert backends.unsupported(gpu, "triton") == reason
    assert backends.resolve("auto") == ("triton" if reason is None else "jax")
    assert backends.resolve("auto", "takes no such thing") == "jax"
    if reason is not None:
        with pytest.raises(ValueError, match=f"backend 'triton' {reason}; backend='jax' runs everywhere"):
            backends.resolve("triton")


def test_wgmma_is_hoppers_alone():
    for capability, reason in (("9.0", None), ("8.9", "needs compute capability 9.0"), ("10.0", "needs a Hopper GPU")):
        said = backends.unsupported(_Device("gpu", "NVIDIA", capability), "mosaic")
        assert (said is None) == (reason is None)
        assert reason is None or said.startswith(reason)

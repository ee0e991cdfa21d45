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
from random_codes import Case, case

from pallas_kernels import device, int4_matmul
from pallas_kernels.int4_matmul import triton
from pallas_kernels.int4_matmul.planes import Planes, RuntimeKernel, expanded, fuse, to_file, to_runtime
from pallas_kernels.int4_matmul.triton import Tiling

TOLERANCE = {"bfloat16": 2**-8, "float16": 2**-10, "float32": 2e-6}


def runtime(found: Case) -> RuntimeKernel:
    return to_runtime(*found.arrays, group_size=found.group_size, bits=found.bits)


def rows(m: int, k: int, dtype: str = "float32", seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((m, k)), dtype)


def multiplied(x: jax.Array, kernel: RuntimeKernel, backend: str) -> jax.Array:
    return int4_matmul(
        x,
        kernel.qweight,
        kernel.scales,
        kernel.zeros,
        group_size=kernel.layout.group_size,
        order=kernel.order,
        layout=kernel.layout,
        bits=kernel.layout.bits,
        backend=backend,
    )


def assert_is_product(y: jax.Array, x: jax.Array, w_kn: np.ndarray, dtype: str) -> None:
    """To the rounding of the result and of the kernel in that dtype, relative to what the sum of absolute products allows."""
    x_mk = np.asarray(x, np.float64)
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], w_kn.shape[1])
    off = np.abs(np.asarray(y, np.float64) - x_mk @ w_kn)
    allowed = TOLERANCE[dtype] * np.sqrt(np.square(x_mk) @ np.square(w_kn)) * 2 + TOLERANCE[dtype] * np.abs(x_mk @ w_kn)
    assert np.all(off <= allowed), float(np.max(off / allowed))


@settings(max_examples=6)
@given(
    st.sampled_from([4, 8]),
    st.sampled_from([(32, 32), (64, 32), (160, 160), (160, 32), (192, 96), (256, 128), (384, 128), (512, 256), (320, 64)]),
    st.sampled_from([8, 40, 64, 136]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_the_runtime_layout_holds_what_the_file_layout_does(bits, sizes, n, sym, ordered, seed):
    found = case(sizes[0], n, sizes[1], bits=bits, sym=sym, ordered=ordered, seed=seed)
    kernel = runtime(found)
    for before, after in zip(found.arrays, to_file(kernel), strict=True):
        assert (before is None) == (after is None)
        if before is not None:
            assert before.dtype == after.dtype
            np.testing.assert_array_equal(before, after)
    w_kn = np.asarray(expanded(kernel))
    if kernel.order is not None:
        w_kn = w_kn[np.argsort(kernel.order)]
    np.testing.assert_array_equal(w_kn, found.w_kn)


def test_the_words_lie_where_the_layout_says():
    codes = np.random.default_rng(0).integers(0, 16, (256, 8))
    found = case(256, 8, 128)
    words = np.asarray(to_runtime(jnp.asarray(_words(codes)), found.arrays[1], group_size=128).qweight).view(np.uint32)
    for k in (0, 1, 15, 16, 127, 128, 200, 255):
        tile, plane, row = k // 128, k % 128 // 16, k % 16
        assert words[16 * tile + row, 3] >> (4 * plane) & 15 == codes[k, 3]


def _words(codes: np.ndarray) -> np.ndarray:
    """The file layout of 4-bit codes, in numpy."""
    return sum(codes[i::8].astype(np.uint32) << np.uint32(4 * i) for i in range(8)).view(np.int32)


KERNELS = {
    # k, n, group, bits, sym, ordered, m, dtype
    "one row": (256, 64, 128, 4, True, False, 1, "bfloat16"),
    "two rows, no tile is full": (96, 8, 32, 4, False, False, 2, "float16"),
    "odd rows, groups in a tile": (384, 72, 32, 4, False, True, 17, "bfloat16"),
    "one group": (160, 40, 160, 4, False, False, 3, "float32"),
    "one group of several tiles": (512, 64, 512, 4, False, False, 33, "bfloat16"),
    "groups across tiles": (192, 128, 96, 4, True, True, 33, "float16"),
    "groups of two tiles": (1024, 64, 256, 4, False, False, 65, "bfloat16"),
    "rows of two programs": (256, 64, 64, 4, True, False, 129, "float32"),
    "as many rows as a kernel takes": (128, 64, 128, 4, False, False, 256, "bfloat16"),
    "more than a kernel takes": (128, 64, 128, 4, False, True, 257, "bfloat16"),
    "bytes": (512, 136, 64, 8, False, False, 5, "float32"),
    "bytes, many rows": (256, 64, 128, 8, True, True, 64, "bfloat16"),
}


@pytest.mark.parametrize("name", list(KERNELS))
@pytest.mark.parametrize("backend", ["interpret", "jax"])
def test_products_are_those_of_the_oracle(name, backend):
    k, n, group_size, bits, sym, ordered, m, dtype = KERNELS[name]
    found = case(k, n, group_size, bits=bits, sym=sym, ordered=ordered)
    x = rows(m, k, dtype)
    assert_is_product(multiplied(x, runtime(found), backend), x, found.w_kn, dtype)


def test_a_compiled_product_runs_where_x_is_permuted():
    # XLA has compiled the product of a permuted bfloat16 x of this shape for a CPU as something that it cannot run.
    found = case(1536, 640, 96, sym=False, ordered=True)
    x = rows(129, 1536, "bfloat16")
    y = jax.jit(lambda x, kernel: multiplied(x, kernel, "jax"))(x, runtime(found))
    assert_is_product(y, x, found.w_kn, "bfloat16")


FORMS = {
    "gemv": Tiling(form="gemv", rows=4, columns=64, parts=2, warps=4, stages=2),
    "gemv of one row": Tiling(form="gemv", rows=1, columns=64, parts=1, warps=4, stages=2),
    "planes": Tiling(form="planes", rows=16, columns=64, parts=4, warps=4, stages=2),
    "swapped": Tiling(form="swapped", rows=32, columns=64, parts=2, warps=4, stages=2),
    "atomics": Tiling(form="planes", rows=16, columns=64, parts=4, warps=4, stages=2, atomics=True),
}


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 256])
def test_every_form_of_the_kernel_multiplies(form, bits, group_size):
    found = case(512, 128, group_size, bits=bits, sym=False)
    kernel, x = runtime(found), rows(5, 512)
    y = triton.product(x, kernel.qweight, kernel.scales, kernel.zeros, kernel.layout, FORMS[form], interpret=True)
    assert_is_product(y, x, found.w_kn, "float32")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_file_layout_runs_at_every_width(bits):
    found = case(192, 64, 64, bits=bits, sym=False, ordered=True)
    qweight, scales, zeros, order = found.arrays
    x = rows(7, 192)
    y = int4_matmul(x, qweight, scales, zeros, group_size=64, order=order, layout="file", bits=bits)
    assert_is_product(y, x, found.w_kn, "float32")


@pytest.mark.parametrize("backend", ["interpret", "jax"])
def test_the_gradient_of_x_is_the_transposed_product(backend):
    found = case(192, 72, 96, sym=False, ordered=True)
    kernel, x = runtime(found), rows(6, 192).reshape(2, 3, 192)
    pull = rows(6, 72, seed=2).reshape(2, 3, 72)
    y, back = jax.vjp(lambda x: multiplied(x, kernel, backend), x)
    assert_is_product(y, x, found.w_kn, "float32")
    assert_is_product(back(pull)[0], pull, found.w_kn.T, "float32")


def test_vmap_gives_the_product_of_every_item():
    found = case(128, 64, 64, sym=False)
    kernel, x = runtime(found), rows(6, 128).reshape(3, 2, 128)
    y = jax.vmap(lambda x: multiplied(x, kernel, "interpret"))(x)
    assert_is_product(y, x, found.w_kn, "float32")
    other = case(128, 64, 64, sym=False, seed=5)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), kernel, runtime(other))
    y = jax.vmap(lambda kernel, x: multiplied(x, kernel, "interpret"))(both, x[:2])
    for index, one in enumerate((found, other)):
        assert_is_product(y[index], x[index], one.w_kn, "float32")


def test_kernels_are_fused_and_their_outputs_lie_side_by_side():
    parts = [case(128, n, 64, sym=False, seed=n) for n in (40, 8, 72)]
    fused, x = fuse([runtime(part) for part in parts]), rows(4, 128)
    assert fused.layout.n == 120
    w_kn = np.concatenate([part.w_kn for part in parts], axis=1)
    assert_is_product(multiplied(x, fused, "interpret"), x, w_kn, "float32")
    with pytest.raises(ValueError, match=r"must agree in \(K, bits, group_size, symmetric\)"):
        fuse([runtime(parts[0]), runtime(case(128, 40, 32, sym=False))])
    with pytest.raises(ValueError, match="same order"):
        fuse([runtime(case(128, 40, 32, ordered=True, seed=seed)) for seed in (1, 2)])


def test_eight_devices_multiply_with_their_columns_under_shard_map(tmp_path: Path):
    program = Path(__file__).parents[1] / "support" / "matmul_on_mesh.py"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    ran = subprocess.run(
        [sys.executable, str(program)], env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["columns", "rows"]


def test_what_does_not_agree_is_named():
    found = case(256, 64, 64, sym=False)
    kernel, x = runtime(found), rows(3, 256)
    qweight, scales, zeros, _ = found.arrays
    with pytest.raises(ValueError, match=r"scales must be \[4, 64\] for x \[3, 256\], found \[3, 64\]; zeros must be \[4, 8\]"):
        int4_matmul(x, qweight, scales[:3], zeros[:, :4], group_size=64, layout="file")
    with pytest.raises(ValueError, match=r"qweight must be \[24, 64\] for x \[3, 192\], found \[32, 64\]"):
        int4_matmul(rows(3, 192), qweight, scales, group_size=64, layout="file")
    with pytest.raises(ValueError, match="group_size must be a multiple of 32 that divides K = 256, or K itself, found 96"):
        int4_matmul(x, qweight, scales, group_size=96, layout="file")
    with pytest.raises(ValueError, match="K is 128, the layout's is 256"):
        multiplied(rows(3, 128), kernel, "jax")
    with pytest.raises(ValueError, match="runtime layout version 7 is unknown, this release has version 1; convert"):
        dataclasses.replace(kernel.layout, version=7)
    with pytest.raises(ValueError, match="holds codes of"):
        Planes(k=256, n=64, bits=3, group_size=64)
    with pytest.raises(ValueError, match="x must be bfloat16, float16 or float32, found int32"):
        multiplied(x.astype(jnp.int32), kernel, "jax")
    with pytest.raises(ValueError, match=r"backend must be one of .*'triton'.*, found 'cuda'"):
        multiplied(x, kernel, "cuda")
    with pytest.raises(ValueError, match="reads the runtime layout; convert"):
        int4_matmul(x, qweight, scales, zeros, group_size=64, layout="file", backend="interpret")
    with pytest.raises(ValueError, match="order must give every group 64 rows"):
        to_runtime(qweight, scales, zeros, jnp.zeros(256, jnp.int32), group_size=64)


class _Device:
    """What a device says of itself."""

    def __init__(self, platform: str, kind: str, capability: str):
        self.platform, self.device_kind, self.compute_capability = platform, kind, capability


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (_Device("gpu", "NVIDIA H200", "9.0"), None),
        (_Device("gpu", "Tesla V100", "7.0"), "needs compute capability 8.0, Tesla V100 has 7.0"),
        (_Device("gpu", "AMD Instinct", "gfx942"), "needs an NVIDIA GPU, found AMD Instinct"),
        (_Device("cpu", "cpu", ""), "needs an NVIDIA GPU, found cpu"),
    ],
)
def test_a_device_that_cannot_run_the_kernels_falls_to_plain_jax_and_says_why_when_asked_for(found, reason, monkeypatch):
    monkeypatch.setattr(device.jax, "devices", lambda: [found])
    assert device.missing(found, "triton") == reason
    assert device.resolve("auto") == ("triton" if reason is None else "jax")
    assert device.resolve("auto", "takes no such thing") == "jax"
    if reason is not None:
        with pytest.raises(ValueError, match=f"backend 'triton' {reason}; backend='jax' runs everywhere"):
            device.resolve("triton")


def test_wgmma_is_hoppers_alone():
    for capability, reason in (("9.0", None), ("8.9", "needs compute capability 9.0"), ("10.0", "needs a Hopper GPU")):
        found = device.missing(_Device("gpu", "NVIDIA", capability), "mosaic")
        assert (found is None) == (reason is None)
        assert reason is None or found.startswith(reason)

"""Run by test_int4_matmul.py in a process of its own, on eight forced CPU devices: interpreted kernels under shard_map."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from random_codes import case

from pallas_kernels import int4_matmul
from pallas_kernels.int4_matmul.planes import Planes, RuntimeKernel, to_runtime


def main() -> None:
    assert jax.device_count() == 8
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    found = case(256, 8 * 64, 64, sym=False)
    kernel = to_runtime(*found.arrays, group_size=64)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((16, 256)), jnp.float32)
    expected = np.asarray(x, np.float64) @ found.w_kn

    def multiplied(x: jax.Array, parts: tuple[jax.Array, ...], layout: Planes) -> jax.Array:
        words, scales, zeros = parts
        return int4_matmul(x, words, scales, zeros, group_size=64, layout=layout, backend="interpret")

    def parts_of(kernel: RuntimeKernel) -> tuple[jax.Array, ...]:
        return kernel.qweight, kernel.scales, kernel.zeros

    # Each device has 64 columns, and a layout that says so.
    local = Planes(k=256, n=64, bits=4, group_size=64)
    columns = jax.shard_map(
        lambda x, parts: multiplied(x, parts, local),
        mesh=mesh,
        in_specs=(P(), P(None, "model")),
        out_specs=P(None, "model"),
        check_vma=False,
    )
    np.testing.assert_allclose(jax.jit(columns)(x, parts_of(kernel)), expected, atol=1e-4)
    print("columns")
    rows = jax.shard_map(
        lambda x, parts: multiplied(x, parts, kernel.layout),
        mesh=mesh,
        in_specs=(P("model"), P()),
        out_specs=P("model"),
        check_vma=False,
    )
    np.testing.assert_allclose(jax.jit(rows)(x, parts_of(kernel)), expected, atol=1e-4)
    print("rows")


if __name__ == "__main__":
    main()

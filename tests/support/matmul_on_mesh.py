"""Run by test_int4_matmul.py in a process of its own, on eight forced CPU devices: interpreted kernels under shard_map."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from random_codes import case

from pallas_kernels import RuntimeKernel, int4_matmul_runtime


def main() -> None:
    assert jax.device_count() == 8
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    packed = case(256, 8 * 64, 64, sym=False)
    kernel = packed.kernel
    x = jnp.asarray(np.random.default_rng(1).standard_normal((16, 256)), jnp.float32)
    expected = np.asarray(x, np.float64) @ packed.w_kn

    def with_columns(x: jax.Array, kernel: RuntimeKernel) -> jax.Array:
        # A device holds 64 columns; the layout has to say so.
        local = dataclasses.replace(kernel, layout=dataclasses.replace(kernel.layout, n=64))
        return int4_matmul_runtime(x, local, backend="interpret")

    def with_rows(x: jax.Array, kernel: RuntimeKernel) -> jax.Array:
        return int4_matmul_runtime(x, kernel, backend="interpret")

    of_columns, of_rows = P(None, "model"), P("model")
    columns = jax.shard_map(with_columns, mesh=mesh, in_specs=(P(), of_columns), out_specs=of_columns, check_vma=False)
    np.testing.assert_allclose(jax.jit(columns)(x, kernel), expected, atol=1e-4)
    print("columns")
    rows = jax.shard_map(with_rows, mesh=mesh, in_specs=(of_rows, P()), out_specs=of_rows, check_vma=False)
    np.testing.assert_allclose(jax.jit(rows)(x, kernel), expected, atol=1e-4)
    print("rows")


if __name__ == "__main__":
    main()

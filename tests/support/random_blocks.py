"""Random blocks of the solver's inner loop."""

import functools

import jax.numpy as jnp
import numpy as np

from jgptq.solver.codes.grid import search_grid
from pallas_kernels import Given, Searched
from pallas_kernels.gptq_block.shapes import Shape


def search_of(shape: Shape) -> functools.partial:
    """The solver's search of grids, with the settings of a shape."""
    return functools.partial(search_grid, bits=shape.bits, sym=shape.sym, scale=shape.scale)


def block_of(shape: Shape, *, exact: bool = False, seed: int = 0) -> tuple:
    """Rows, factor, grids and drift of a block; where `exact`, of such few bits that no sum is rounded, whatever its order."""
    random = np.random.default_rng(seed)
    rows, n, of_scale = shape.rows, shape.n, 1 if shape.grids == "shared" else shape.rows
    if exact:
        # Halves and few terms: codes fall on ties again and again.
        u_rr = np.eye(rows) + np.triu(random.integers(-1, 2, (rows, rows)) * (random.random((rows, rows)) < 0.05), 1)
        w_rn = random.integers(-24, 25, (rows, n)) / 2
        scale_rn = np.ones((of_scale, n))
    else:
        factor = np.linalg.cholesky(np.cov(random.standard_normal((rows, 4 * rows))) + 0.1 * np.eye(rows))
        u_rr, w_rn = factor.T, random.standard_normal((rows, n))
        scale_rn = random.uniform(0.1, 0.3, (of_scale, n))
    zero_rn = random.integers(0, 16, scale_rn.shape)
    drift_rr = jnp.asarray(np.triu(u_rr, 1) * 0.5, jnp.float32) if shape.drift else None
    w_rn, u_rr, scale_rn, zero_rn = (jnp.asarray(part, jnp.float32) for part in (w_rn, u_rr, scale_rn, zero_rn))
    if shape.grids != "searched":
        return w_rn, u_rr, Given(scale_rn, zero_rn), drift_rr
    weight_r = jnp.asarray(np.random.default_rng(rows).lognormal(size=rows), jnp.float32)
    return w_rn, u_rr, Searched(weight_r, shape.group_size, search_of(shape)), drift_rr

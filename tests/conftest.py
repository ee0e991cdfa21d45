"""Strict arithmetic for every test: no implicit promotion of dtypes or ranks. Tests import `oracles` from this folder."""

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

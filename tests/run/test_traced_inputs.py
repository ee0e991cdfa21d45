"""What a traced model may be, and what is refused: trees, batches, modules, settings."""

from typing import Any

import foreign_plain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jgptq
from jgptq.errors import CalibrationError, ConfigError, NumericalError
from jgptq.trace.packed_array import PackedArray

SETTINGS: dict[str, Any] = {"bits": 3, "group_size": 32}
X = np.ones((8, 64), np.float32)
W = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)


def tokens(samples: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, foreign_plain.VOCAB, (samples, 16)).astype(np.int32)


def test_a_batch_size_that_does_not_divide_is_made_smaller():
    x = np.random.default_rng(1).normal(size=(24, 64)).astype(np.float32)
    pairs = [jgptq.quantize({"w": W}, x, apply=lambda t, x: x @ t["w"], batch_size=size, **SETTINGS) for size in (9, 8)]
    np.testing.assert_array_equal(*(tree["w"].packed.qweight for tree, _ in pairs))
    assert [report.rows[0].tokens for _, report in pairs] == [24, 24]


BAD = {
    "no linear": ({"w": W}, lambda t, x: x * jnp.sum(t["w"]), {}, ConfigError, r"no linear can be packed \(w: another array"),
    "no array": ({"w": 3.0}, lambda t, x: x, {}, ConfigError, "holds no float array"),
    "control flow": ({"w": W}, lambda t, x: x @ t["w"] if x[0, 0] > 0 else x, {}, ConfigError, "depends on the values"),
    "an index": ({"w": W}, lambda t, x: x @ t["w"] * float(x[0, 0]), {}, ConfigError, "depends on the values"),
    "group size": ({"w": W}, lambda t, x: x @ t["w"], {"group_size": 96}, ConfigError, "w has K=64 and group_size 96.*32, 64"),
    "tune": ({"w": W}, lambda t, x: x @ t["w"], {"preset": "best"}, ConfigError, "tune=0.75 .* pass tune=0"),
    "lm_head": ({"w": W}, lambda t, x: x @ t["w"], {"lm_head": True}, ConfigError, "lm_head=True has no meaning"),
    "sink": ({"w": W}, lambda t, x: x @ t["w"], {"sink": object()}, ConfigError, "sink cannot be used"),
    "no function": ({"w": W}, None, {}, ConfigError, "give apply=fn"),
    "batch size": ({"w": W}, lambda t, x: x @ t["w"], {"batch_size": 0}, ConfigError, "at least 1"),
    "unknown": ({"w": W}, lambda t, x: x @ t["w"], {"bit": 4}, ConfigError, "unknown settings bit"),
    "nan": ({"w": W.at[0, 0].set(jnp.nan)}, lambda t, x: x @ t["w"], {}, NumericalError, "^w: "),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_quantized_is_an_error_that_says_why(case: str):
    params, fn, settings, error, message = BAD[case]
    with pytest.raises(error, match=message):
        jgptq.quantize(params, X, apply=fn, **{"group_size": 32} | settings)


@pytest.mark.parametrize("calib", [None, {}, np.zeros((0, 64), np.float32), (X, X[:4])], ids=["none", "empty", "zero", "uneven"])
def test_calibration_that_is_no_set_of_samples_is_an_error(calib: Any):
    with pytest.raises(CalibrationError):
        jgptq.quantize({"w": W}, calib, apply=lambda t, x: x @ t["w"], group_size=32)


def test_batches_may_be_trees_and_leaves_of_the_model_may_be_no_arrays():
    random = np.random.default_rng(0)
    params = {"w": W, "act": "tanh", "scale": 2.0, "steps": np.arange(3)}
    calib = {"x": random.normal(size=(8, 4, 64)).astype(np.float32), "mask": np.ones((8, 4), bool)}

    def apply(tree: dict[str, Any], batch: dict[str, jax.Array]) -> jax.Array:
        return getattr(jnp, tree["act"])(jnp.where(batch["mask"][..., None], batch["x"], 0.0) @ tree["w"]) * tree["scale"]

    tree, report = jgptq.quantize(params, calib, apply=apply, **SETTINGS)
    assert isinstance(tree["w"], PackedArray)
    assert (tree["act"], tree["scale"]) == ("tanh", 2.0)
    assert [row.tokens for row in report.rows] == [32]


def test_a_parameter_that_modules_share_stays_float():
    class Tied(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.embed = nnx.Embed(96, 64, rngs=rngs)
            self.up = nnx.Linear(64, 64, rngs=rngs)
            self.head = nnx.Linear(64, 96, use_bias=False, rngs=rngs)
            self.head.kernel = self.embed.embedding

        def __call__(self, ids: jax.Array) -> jax.Array:
            return self.up(self.embed(ids)) @ self.head.kernel.T

    module, report = jgptq.quantize(Tied(nnx.Rngs(0)), tokens(), preset="fast", group_size=32)
    note = next(row.note for row in report.rows if row.name == "embed.embedding")
    assert note == "Stays float: it is the weight of a linear, and its rows are looked up (gather)."
    assert module.head.kernel is module.embed.embedding


def test_double_precision_arrays_of_numpy_are_read_as_jax_reads_them():
    params = {"w": np.random.default_rng(0).normal(size=(64, 64))}
    tree, _ = jgptq.quantize(params, np.random.default_rng(1).normal(size=(64, 64)), apply=lambda t, x: x @ t["w"], **SETTINGS)
    assert tree["w"].dtype == jnp.float32


def test_boxes_of_linen_are_opened():
    from flax import linen

    module = linen.Dense(64, kernel_init=linen.with_partitioning(linen.initializers.normal(), (None, "model")))
    variables = module.init(jax.random.key(0), X)
    (_, tree), _ = jgptq.quantize((module, variables["params"]), X, preset="fast", **SETTINGS)
    assert isinstance(tree["kernel"], PackedArray)
    np.testing.assert_allclose(module.apply({"params": tree}, X), module.apply({"params": jgptq.dequantized(tree)}, X), atol=1e-5)

"""Models that are not ours: what is solved on which inputs, what runs on the result, and what is refused."""

import dataclasses
from typing import Any

import foreign_linen
import foreign_nnx
import foreign_plain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

import jgptq
from jgptq.errors import CalibrationError, ConfigError, NumericalError, RuleWarning
from jgptq.models.packed import unpack
from jgptq.solver import solve
from jgptq.solver.statistics.hessian import accumulate, empty, hessian
from jgptq.trace import evaluate
from jgptq.trace.packed_array import PackedArray

SETTINGS: dict[str, Any] = {"bits": 3, "group_size": 32}
DOT = "layers.0.mlp.down_proj.kernel"


def tokens(samples: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, foreign_plain.VOCAB, (samples, 16)).astype(np.int32)


def plain(**settings: Any) -> tuple[dict[str, Any], Any]:
    return jgptq.quantize(foreign_plain.model(), tokens(), apply=foreign_plain.forward, batch_size=8, **SETTINGS | settings)


@pytest.fixture(scope="module")
def fast() -> tuple[dict[str, Any], Any]:
    return plain(preset="fast")


def seen_inputs(tree: dict[str, Any]) -> dict[str, list[jax.Array]]:
    """What the linears of every layer read when a tree runs on all samples at once, layer by layer without a scan."""
    tree = jgptq.dequantized(tree)
    seen: dict[str, list[jax.Array]] = {}
    h = tree["embed"][tokens()]
    for index in range(foreign_plain.LAYERS):
        one = jax.tree.map(lambda leaf, index=index: leaf[index], tree["layers"])
        h, _ = foreign_plain.layer(h, one, lambda names, x: [seen.setdefault(n, []).append(x) for n in names.split()])
    return seen


def fraction_differing(quantized: dict[str, Any]) -> float:
    """Of all weights of the layers, those that differ from a solve by hand on what the quantized model reads."""
    seen, floats = seen_inputs(quantized), foreign_plain.model()["layers"]
    layers = jgptq.dequantized(quantized)["layers"]
    differing = []
    for name, inputs in seen.items():
        for index, h in enumerate(inputs):
            w, solved = (tree[name] if name in "qkvo" else tree[name]["kernel"] for tree in (floats, layers))
            h = h.reshape(h.shape[0] * h.shape[1], -1)
            to_kn = (lambda a: a.T) if name == "down" else (lambda a, k=h.shape[1]: a.reshape(k, -1))
            h_kk = hessian(accumulate(empty(h.shape[-1]), h))
            expected = solve(to_kn(w[index]), h_kk, jgptq.QuantizeConfig(**SETTINGS)).dequantize()
            differing.append(np.abs(np.asarray(to_kn(solved[index]) - expected)) > 1e-5)
    return float(np.mean(np.concatenate([part.reshape(-1) for part in differing])))


def test_every_linear_is_solved_on_what_the_quantized_ones_before_it_produce(fast):
    assert fraction_differing(fast[0]) < 0.02


def test_a_hessian_of_other_features_would_be_seen(monkeypatch: pytest.MonkeyPatch):
    """The check above fails for sums over features in another order."""
    right = evaluate._accumulate

    def wrong(group, total, known):
        linear = group.linears[0]
        x_tk = linear.x_tk.transposed(1, 0).reshaped(*linear.x_tk.result)
        other = dataclasses.replace(group, linears=(dataclasses.replace(linear, x_tk=x_tk), *group.linears[1:]))
        return right(other, total, known)

    monkeypatch.setattr(evaluate, "_accumulate", wrong)
    assert fraction_differing(plain(preset="fast")[0]) > 0.1


def test_linears_that_read_the_same_value_share_a_hessian(monkeypatch: pytest.MonkeyPatch):
    groups = []
    sums = evaluate._empty_sums
    monkeypatch.setattr(evaluate, "_empty_sums", lambda group, drift: groups.append(group) or sums(group, drift))
    plain(method="rtn")
    assert [len(group.linears) for group in groups] == [3, 1, 2, 1] * foreign_plain.LAYERS + [1]


def compile_count(monkeypatch: pytest.MonkeyPatch, params: Any, **settings: Any) -> int:
    compiled = []
    lower = evaluate.Runner._compiled
    seen: set[int] = set()

    def counted(self, *arguments):
        program = lower(self, *arguments)
        seen.add(id(program))
        compiled.append(program)
        return program

    monkeypatch.setattr(evaluate.Runner, "_compiled", counted)
    jgptq.quantize(params, tokens(8), batch_size=4, method="rtn", **SETTINGS | settings)
    return len(seen)


def test_layers_that_are_alike_compile_once(monkeypatch: pytest.MonkeyPatch):
    """Not only in a scan: the layers of a list are traced one by one."""
    two = compile_count(monkeypatch, foreign_nnx.model())
    monkeypatch.setattr(foreign_nnx, "LAYERS", 4)
    four = compile_count(monkeypatch, foreign_nnx.model())
    # The boundary between two layers is one program, whatever the number of layers.
    assert four == two


MODELS = {
    "plain": (foreign_plain.model, foreign_plain.forward, None),
    "linen": (foreign_linen.model, lambda pair, batch: pair[0].apply(pair[1], batch), None),
    "nnx": (foreign_nnx.model, lambda module, batch: module(batch), None),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_same_function_runs_on_the_result_and_gptq_keeps_its_outputs_closer_than_rounding(name: str):
    make, call, _ = MODELS[name]
    params, held_out = make(), jnp.asarray(tokens(16, seed=9))
    apply = call if name == "plain" else None
    errors = {}
    for method in ("gptq", "rtn"):
        quantized, report = jgptq.quantize(params, tokens(), apply=apply, preset="fast", method=method, **SETTINGS)
        logits = jax.jit(lambda tree: call(tree, held_out))(quantized) if name == "plain" else call(quantized, held_out)
        np.testing.assert_allclose(logits, call(jgptq.dequantized(quantized), held_out), atol=1e-5)
        errors[method] = float(jnp.linalg.norm((logits - call(params, held_out)).reshape(-1)))
        assert type(quantized) is type(params)
    assert errors["gptq"] < 0.9 * errors["rtn"]
    assert any(row.name.endswith("kernel[2]") or "layers" in row.name for row in report.rows if row.quantized)


def test_the_report_names_every_float_array_and_why_it_stays_float(fast):
    rows = {row.name: row for row in fast[1].rows}
    layers = [f"layers.{name}[{i}]" for i in range(3) for name in ("q", "k", "v", "o")]
    assert all(rows[name].tokens == 24 * 16 and rows[name].loss < rows[name].rtn_loss for name in layers)
    assert (rows["layers.down.kernel[1]"].k, rows["layers.down.kernel[1]"].n) == (96, 64)
    assert "looked up (gather)" in rows["embed"].note
    assert "another array is computed from it (add)" in rows["layers.norm"].note
    assert len(rows) == 3 * 7 + 1 + 3


FORMS = {"llama": {}, "opt": tiny.OPT, "gemma2": tiny.GEMMA2}


@pytest.mark.parametrize("preset", ["fast", "balanced"])
@pytest.mark.parametrize("form", FORMS)
def test_our_own_decoder_gets_the_codes_of_the_staged_driver(form: str, preset: str):
    params, calib = tiny.decoder(dtype=jnp.float32, **FORMS[form]), tiny.tokens()
    settings = SETTINGS | {"preset": preset, "batch_size": 8}
    staged, _ = jgptq.quantize(params, calib, **settings)
    traced, _ = jgptq.quantize(params, calib, apply=lambda m, t: m(t), rules={"-:lm_head": {}}, **settings)
    same, every = 0, 0
    for ours, theirs in zip(staged.layers, traced.layers, strict=True):
        for path, linear in ours.linears().items():
            expected, _ = unpack(linear.kernel.get_value())
            codes, _ = unpack(theirs.linears()[path].kernel.get_value().packed)
            same, every = same + int(jnp.sum(codes == expected)), every + codes.size
    assert same >= 0.999 * every  # up to ties
    np.testing.assert_allclose(traced(calib[:2]), jgptq.dequantized(traced)(calib[:2]), atol=1e-5)


def test_drift_is_corrected(fast):
    """With targets shifted to the float model's, the outputs on the calibration samples are nearer to its."""
    balanced, _ = plain(preset="balanced")
    calib = tokens()
    wanted = foreign_plain.forward(foreign_plain.model(), calib)
    errors = [float(jnp.linalg.norm((foreign_plain.forward(t, calib) - wanted).reshape(-1))) for t in (balanced, fast[0])]
    assert errors[0] < errors[1]


def test_rules_apply_to_the_names_in_the_tree():
    rules = {"-:head": {}, r"+:layers\.o": {"bits": 8}}
    tree, report = plain(method="rtn", rules=rules)
    assert isinstance(tree["head"], jax.Array)
    assert tree["layers"]["o"].packed.bits == 8
    assert tree["layers"]["q"].packed.bits == 3
    assert next(row for row in report.rows if row.name == "head").note == "Stays float: skipped by rule 'head'."


def test_rules_can_part_linears_that_share_a_hessian():
    tree, report = plain(preset="fast", rules={r"+:layers\.v": {"bits": 8}})
    assert tree["layers"]["v"].packed.bits == 8
    losses = {row.name: row.loss for row in report.rows}
    assert losses["layers.v[0]"] < 0.1 * losses["layers.k[0]"]


def test_rules_cannot_part_layers_of_one_array():
    with pytest.raises(ConfigError, match=r"layers\.q\[0\] and layers\.q\[2\] different settings.*layers of one array"):
        plain(rules={r"+:layers\.q\[2\]": {"bits": 8}})


def test_a_rule_without_effect_is_a_warning():
    with pytest.warns(RuleWarning, match="matches no linear of this model; the nearest names are"):
        plain(method="rtn", rules={"-:transformer": {}})


def test_an_asymmetric_grid_and_a_permuted_order_run_as_well():
    params = {"up": jnp.asarray(np.random.default_rng(0).normal(size=(64, 96)) + 0.3, jnp.bfloat16)}
    x = jnp.asarray(np.random.default_rng(1).normal(size=(64, 64)), jnp.bfloat16)
    tree, report = jgptq.quantize(params, x, apply=lambda t, x: x @ t["up"], sym=False, order="desc_act", **SETTINGS)
    assert tree["up"].packed.group_index is not None
    assert tree["up"].dtype == jnp.bfloat16
    assert report.rows[0].loss < report.rows[0].rtn_loss


def test_a_batch_size_that_does_not_divide_is_made_smaller():
    codes = [plain(preset="fast", batch_size=size)[0]["layers"]["q"].packed.qweight for size in (9, 8)]
    np.testing.assert_array_equal(*codes)


def linear(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ w


X = np.ones((8, 64), np.float32)
W = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)

BAD = {
    "no linear": ({"w": W}, lambda t, x: x * jnp.sum(t["w"]), {}, ConfigError, r"no linear can be packed \(w: it is read by"),
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

"""Tuning of scales and norms, and the driver under every method, order and search of scales."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jgptq
from jgptq.errors import ConfigError
from jgptq.models import Decoder
from jgptq.models.packed import PackedTensor, unpack
from jgptq.run import tune
from jgptq.settings.presets import PRESETS, make_config
from jgptq.solver.methods import method_of

pytestmark = pytest.mark.filterwarnings("ignore:vLLM refuses 3-bit")
SMALL = {"intermediate_size": 64, "num_hidden_layers": 2, "layer_windows": (None, None)}
STEPS = 16
PASSES = 2 * STEPS / 12  # of twelve lessons, two in a step


_through = jax.jit(lambda block, residual: block(residual))
_logits = jax.jit(lambda model, tokens: model(tokens))


def kernels(model: Decoder) -> dict[str, PackedTensor]:
    """By path, the packed ones."""
    return {
        f"{index}.{name}": linear.kernel.get_value()
        for index, block in enumerate(model.layers)
        for name, linear in block.linears().items()
        if isinstance(linear.kernel.get_value(), PackedTensor)
    }


@pytest.fixture(scope="module")
def original() -> Decoder:
    return tiny.decoder(**SMALL)


@pytest.fixture(scope="module")
def rounded(original: Decoder) -> Decoder:
    """At 3 bits, asymmetric, so that zero points are there to be left alone."""
    return jgptq.quantize(original, method="rtn", bits=3, sym=False, group_size=32)[0]


@pytest.fixture(scope="module")
def lessons(original: Decoder) -> list:
    """Batches of tokens, and the float model's residual stream after its last block."""
    batches = tiny.tokens(48).reshape(12, 4, -1)

    def stream(tokens: np.ndarray) -> jax.Array:
        residual = original.embed(jnp.asarray(tokens))
        for block in original.layers:
            residual = _through(block, residual)
        return residual

    return [tune.Lesson(tokens, stream(tokens)) for tokens in batches]


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Steps of two lessons, sixteen of them at least."""
    patch.setattr(tune, "STEP_TOKENS", 128)
    patch.setattr(tune, "STEPS", STEPS)


@pytest.fixture
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)


@pytest.fixture(scope="module")
def tuned(original: Decoder, rounded: Decoder, lessons: list):
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        return tune.tune(rounded, original, lessons, PASSES)


def divergence(model: Decoder, original: Decoder, tokens: np.ndarray) -> float:
    """The mean Kullback-Leibler divergence of predictions from the float model's, in numpy."""

    def log_predicted(decoder: Decoder) -> np.ndarray:
        logits = np.asarray(_logits(decoder, jnp.asarray(tokens)), np.float64)
        return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))

    wanted, predicted = log_predicted(original), log_predicted(model)
    return float(np.mean(np.sum(np.exp(wanted) * (wanted - predicted), axis=-1)))


def test_tuning_brings_predictions_nearer_to_the_float_models_on_other_tokens(original, rounded, lessons, tuned):
    model, report = tuned
    assert report.kept
    assert report.steps == STEPS
    held_out = lessons[0].tokens
    assert report.before == pytest.approx(divergence(rounded, original, held_out), rel=1e-3)
    assert report.after == pytest.approx(divergence(model, original, held_out), rel=1e-2)  # float16 leaves
    assert report.after < 0.95 * report.before
    unseen = tiny.tokens(4, seed=9)
    assert divergence(model, original, unseen) < 0.95 * divergence(rounded, original, unseen)


def test_tuning_moves_scales_and_norms_and_nothing_else(rounded, tuned):
    model, _ = tuned
    before, after = (jax.tree_util.tree_flatten_with_path(part)[0] for part in (rounded, model))
    moved = set()
    for (path, old), (other, new) in zip(before, after, strict=True):
        assert path == other
        assert (old.dtype, old.shape) == (new.dtype, new.shape)
        if not np.array_equal(np.asarray(old), np.asarray(new)):
            name = jax.tree_util.keystr(path)
            moved.add(name)
            assert ".scales" in name or "norm" in name, path
    assert sum("norm" in name for name in moved) == 2 * 2 + 1
    assert sum(".scales" in name for name in moved) == len(kernels(model)) == 14
    for name, kernel in kernels(model).items():
        for left, right in zip(unpack(kernel), unpack(kernels(rounded)[name]), strict=True):
            np.testing.assert_array_equal(left, right)
        assert np.all(np.asarray(kernel.scales) > 0)


def test_tuning_leaves_the_model_that_it_was_given_as_it_was_and_repeats_itself(original, rounded, lessons, tuned, short_steps):
    before = [np.array(leaf) for leaf in jax.tree.leaves(rounded)]
    again, report = tune.tune(rounded, original, lessons, PASSES)
    assert report == tuned[1]
    tiny.assert_same(again, tuned[0])
    for old, leaf in zip(before, jax.tree.leaves(rounded), strict=True):
        np.testing.assert_array_equal(old, np.asarray(leaf))


def test_a_tuning_that_does_not_help_changes_nothing(original, rounded, lessons, short_steps, monkeypatch):
    monkeypatch.setattr(tune, "LEARNING_RATE", 3.0)
    model, report = tune.tune(rounded, original, lessons, 1 / 6)
    assert not report.kept
    assert not report.after < report.before
    tiny.assert_same(model, rounded)


def test_the_gradient_block_by_block_is_that_of_the_whole_forward_pass(original, rounded, lessons):
    model = jax.tree.map(jnp.asarray, rounded)
    teacher = jax.tree.map(jnp.asarray, original).without_blocks()
    random = np.random.default_rng(0)

    def near_one(leaf: jax.Array) -> jax.Array:
        return jnp.asarray(1 + 0.05 * random.normal(size=leaf.shape), jnp.float32)

    blocks = jax.tree.map(near_one, [tune._factors_of(block.norms(), block.linears()) for block in model.layers])
    norm = {"norm": near_one(model.norm.scale.get_value())}

    def loss(blocks: list, norm: dict, tokens: jax.Array, wanted: jax.Array) -> jax.Array:
        residual = model.embed(tokens)
        for block, factors in zip(model.layers, blocks, strict=True):
            residual = tune._with_factors(block, factors)(residual)
        return tune._distance(model.without_blocks(), norm, residual, teacher, wanted)

    whole = jax.jit(jax.grad(loss, argnums=(0, 1)))
    parts = [whole(blocks, norm, jnp.asarray(lesson.tokens), lesson.residual) for lesson in lessons[:2]]
    expected = jax.tree.map(jnp.add, *parts)
    gradient = tune._gradient(model, teacher, blocks, norm, lessons[:2])
    for path, leaf in jax.tree_util.tree_flatten_with_path(expected)[0]:
        other = gradient
        for key in path:
            other = other[getattr(key, "idx", getattr(key, "key", None))]
        assert float(jnp.linalg.norm(leaf.reshape(-1))) > 0
        np.testing.assert_allclose(other, leaf, rtol=1e-3, atol=1e-6)


def test_every_sixteenth_lesson_is_held_out_and_the_others_are_used_one_after_the_other():
    lessons = [tune.Lesson(np.full((2, 4), index), None) for index in range(33)]
    held_out, learnt = tune._split(lessons)
    assert [int(lesson.tokens[0, 0]) for lesson in held_out] == [0, 16, 32]
    assert len(learnt) == 30
    at_most = tune.STEP_TOKENS // 8
    schedule = tune._schedule(learnt, 2 * tune.STEPS * at_most)
    assert [len(chosen) for chosen in schedule] == [at_most] * 2 * tune.STEPS
    assert [len(chosen) for chosen in tune._schedule(learnt, 2 * tune.STEPS + 1)] == [2] * tune.STEPS
    assert [len(chosen) for chosen in tune._schedule(learnt, 5)] == [1] * 5
    seen = [int(lesson.tokens[0, 0]) for lesson in schedule[0]]
    assert sorted(seen[:30]) == sorted(int(lesson.tokens[0, 0]) for lesson in learnt)
    assert seen[:30] != seen[30:60]
    assert tune._split(lessons[:1]) == (lessons[:1], lessons[:1])


DRIVEN = [
    {"method": "gptq", "order": "static", "scale": "mse", "bits": 3, "sym": False, "refine": 1},
    {"method": "gptaq", "order": "desc_act", "scale": "hessian", "bits": 3},
    {"method": "qronos", "order": "none", "scale": "minmax", "bits": 4, "tune": 2},
]


@pytest.mark.parametrize("settings", DRIVEN, ids=lambda settings: settings["method"])
def test_the_driver_takes_every_method_order_and_scale_and_stays_below_rounding(settings: dict):
    params = tiny.decoder(intermediate_size=64, num_hidden_layers=1, layer_windows=(None,))
    model, report = jgptq.quantize(params, tiny.tokens(48), group_size=32, **settings)
    assert len(report.rows) == len(kernels(model)) == 7
    for row in report.rows:
        assert row.outcome == "SOLVED"
        assert 0 < row.loss < row.rtn_loss
    assert (report.tuning is not None) == ("tune" in settings)
    for kernel in kernels(model).values():
        assert kernel.bits == settings["bits"]
        assert (kernel.zeros is None) == settings.get("sym", True)
        assert (kernel.group_index is None) == (settings["order"] != "desc_act")
        if kernel.group_index is not None:
            np.testing.assert_array_equal(np.sort(kernel.group_index), np.repeat([0, 1], 32))
            assert not np.array_equal(kernel.group_index, np.repeat([0, 1], 32))


def test_settings_given_with_a_preset_override_it():
    assert make_config({"preset": "best"}) == jgptq.QuantizeConfig(**PRESETS["best"])
    config = make_config({"preset": "best", "refine": 0})
    assert config == dataclasses.replace(make_config({"preset": "best"}), refine=0)
    assert config.tune == PRESETS["best"]["tune"] > 0
    assert make_config({}) == make_config({"preset": "balanced"}) == jgptq.QuantizeConfig()
    assert not method_of(make_config({"preset": "fast"})).statistics.float_model


def test_unknown_presets_and_settings_are_refused_with_those_known():
    with pytest.raises(ConfigError, match=r"preset must be one of .*'fast', 'balanced', 'best'.*, found 'slow'"):
        make_config({"preset": "slow"})
    with pytest.raises(ConfigError, match="unknown settings bit; known are preset, bits, "):
        jgptq.quantize(tiny.decoder(), preset="fast", bit=3)

"""Orbax: a model trained in JAX goes in, is quantized and written; packed trees come back."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from tiny import assert_same

import jgptq
from converters import load_hf, load_orbax, save_hf
from converters.output.describe import COPIED
from jgptq.errors import CheckpointError, OutputError
from jgptq.models import Decoder

pytestmark = pytest.mark.filterwarnings("ignore:vLLM refuses")


def checkpoint(path: Path, tree) -> Path:
    """Written as a training run does."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def trained(steps: int = 2) -> Decoder:
    """A decoder after a few steps of gradient descent in float32."""
    model = tiny.decoder(dtype=jnp.float32)
    graph, params = nnx.split(model)
    tokens = jnp.asarray(tiny.tokens(4))

    def loss(params) -> jax.Array:
        logits = nnx.merge(graph, params)(tokens)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    gradient = jax.jit(jax.grad(loss))
    for _ in range(steps):
        params = jax.tree.map(lambda leaf, slope: leaf - 0.01 * slope, params, gradient(params))
    return nnx.merge(graph, params)


def test_a_model_trained_in_jax_is_quantized_and_served_elsewhere(tmp_path: Path):
    model = trained()
    config = save_hf(tiny.decoder(dtype=jnp.float32), tmp_path / "config", format="float")
    (config / "tokenizer.json").write_text("{}")
    state = checkpoint(tmp_path / "step", {"model": nnx.state(model), "step": jnp.asarray(2)})
    params = load_orbax(state, config, key="model", dtype="float32")
    assert_same(model, params)
    tokens = jnp.asarray(tiny.tokens(2))
    np.testing.assert_array_equal(model(tokens), params(tokens))
    quantized, _ = jgptq.quantize(params, tiny.tokens(), preset="fast", group_size=32)
    out = save_hf(quantized, tmp_path / "out", format="compressed-tensors")
    assert (out / COPIED[0]).read_text() == "{}"
    served = load_hf(out, dtype="float32")
    assert_same(quantized, served)
    assert np.abs(np.asarray(served(tokens) - model(tokens))).max() < 2


@pytest.mark.parametrize("as_tree", [nnx.state, lambda model: nnx.to_pure_dict(nnx.state(model))], ids=["state", "pure-dict"])
def test_both_forms_of_a_state_are_read(tmp_path: Path, as_tree):
    model = tiny.decoder(**tiny.OPT_350M)
    loaded = load_orbax(checkpoint(tmp_path / "step", as_tree(model)), model.config)
    assert_same(model, loaded)
    assert loaded.origin is None


def test_arrays_that_are_missing_unexpected_or_misshapen_are_listed_at_once(tmp_path: Path):
    tree = nnx.to_pure_dict(nnx.state(tiny.decoder()))
    del tree["norm"]
    tree["layers"][0]["mlp"]["up_proj"]["kernel"] = jnp.zeros((64, 64))
    tree["layers"][1]["mlp"]["up_proj"]["kernel"] = jnp.zeros((64, 96), jnp.int32)
    tree["extra"] = {"kernel": jnp.zeros(3)}
    with pytest.raises(CheckpointError) as caught:
        load_orbax(checkpoint(tmp_path / "step", tree), tiny.config())
    message = str(caught.value)
    assert "4 arrays do not fit" in message
    assert "norm.scale is missing, expected [64]" in message
    assert "layers.0.mlp.up_proj.kernel is float32 [64, 64], expected a float [64, 96]" in message
    assert "layers.1.mlp.up_proj.kernel is int32" in message
    assert "extra.kernel is not in a llama" in message


def test_places_without_a_checkpoint_are_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no orbax checkpoint"):
        load_orbax(tmp_path, tiny.config())
    state = checkpoint(tmp_path / "step", {"model": nnx.state(tiny.decoder()), "step": jnp.asarray(2)})
    with pytest.raises(CheckpointError, match="nothing at key 'params', there is model, step"):
        load_orbax(state, tiny.config(), key="params")


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("sym", [True, False, None])
def test_an_orbax_folder_reads_back_as_it_was_written(tmp_path: Path, dtype, sym: bool | None):
    params = tiny.decoder(dtype=dtype, **tiny.GEMMA2)
    if sym is not None:
        params, _ = jgptq.quantize(params, method="rtn", group_size=32, bits=3, sym=sym, rules={".*down_proj": {"bits": 8}})
    out = save_hf(params, tmp_path / "out", format="orbax")
    loaded = load_hf(out)
    assert_same(params, loaded)
    assert loaded.quantization == params.quantization
    assert jax.tree.structure(nnx.state(loaded)) == jax.tree.structure(nnx.state(params))
    assert (out / "README.md").exists() == (sym is not None)


def test_a_packed_tree_is_that_of_the_nnx_state(tmp_path: Path):
    import orbax.checkpoint as ocp

    quantized, _ = jgptq.quantize(tiny.decoder(), method="rtn", group_size=32)
    out = save_hf(quantized, tmp_path / "out", format="orbax")
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(out / "orbax").item_metadata.tree
    assert sorted(tree) == ["embed_tokens", "layers", "lm_head", "norm"]
    assert sorted(tree["layers"]["0"]["mlp"]["up_proj"]["kernel"]) == ["qweight", "scales"]


def test_a_disk_that_is_too_small_is_reported_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(OutputError, match=r"No space left on device; the result needs \d{6} bytes, 10 are free"):
        save_hf(tiny.decoder(), tmp_path / "out", format="orbax")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_named(tmp_path: Path):
    out = save_hf(tiny.decoder(), tmp_path / "out", format="orbax")
    for path in (out / "orbax").rglob("*"):
        if path.is_file() and path.name != "_METADATA":
            path.write_bytes(path.read_bytes()[:7])
    with pytest.raises(CheckpointError, match="out/orbax: the orbax checkpoint is damaged"):
        load_hf(out)

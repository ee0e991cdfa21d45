"""Folders of models with experts: one tensor for each expert and linear, whatever the decoder holds."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import sparse
import tiny
import torch
import twins
from flax import nnx

import jgptq
from converters import load_hf, load_orbax, save_hf
from converters.checkpoint import SINGLE
from converters.names import leaves
from jgptq.errors import CheckpointError
from jgptq.models import Decoder, config_from_hf, config_to_hf, single_linears
from jgptq.models.packed import PackedTensor

GATE = "model.layers.1.mlp.experts.{}.gate_proj"


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / SINGLE)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("form", sparse.FORMS)
def test_float_folder_reads_back_as_it_was_written(tmp_path: Path, form: str, dtype):
    params = tiny.decoder(dtype=dtype, **sparse.FORMS[form])
    loaded = load_hf(save_hf(params, tmp_path / "out", format="float"), dtype="float32")
    assert loaded.config == params.config
    for (path, left, name), (_, right, _) in zip(leaves(params), leaves(loaded), strict=True):
        np.testing.assert_array_equal(getattr(left, name).get_value(), getattr(right, name).get_value(), err_msg=path)
    again = save_hf(loaded, tmp_path / "again", format="float")
    assert (again / SINGLE).read_bytes() == (tmp_path / "out" / SINGLE).read_bytes()


@pytest.mark.parametrize("row", ["qwen3_moe_some_dense", "mixtral", "deepseek_v3"])
def test_transformers_reads_what_is_written(tmp_path: Path, row: str):
    out = save_hf(twins.decoder_of(row), tmp_path / "out", format="float")
    model = type(twins.twin(row)).from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
    np.testing.assert_allclose(twins.torch_logits(model), twins.torch_logits(twins.twin(row)), atol=1e-5)


@pytest.mark.parametrize("form", ["qwen3_moe", "qwen2_moe", "mixtral"])
def test_experts_in_one_tensor_are_read_as_those_in_tensors_of_their_own(tmp_path: Path, form: str):
    params = tiny.decoder(**sparse.FORMS[form])
    out = save_hf(params, tmp_path / "out", format="float")
    fused = tensors(out)
    for index, block in enumerate(params.layers):
        if params.config.sparse_layers[index]:
            before = f"model.layers.{index}.mlp"
            stacks = [block.mlp.experts.gate_proj, block.mlp.experts.up_proj, block.mlp.experts.down_proj]
            gate, up, down = (np.asarray(stack.kernel.get_value()) for stack in stacks)
            for name in [name for name in fused if re.search(rf"\.{index}\..*\.experts\.|\.{index}\.block_sparse_moe", name)]:
                del fused[name]
            fused[f"{before}.gate.weight"] = np.ascontiguousarray(np.asarray(block.mlp.router.kernel.get_value()).T)
            fused[f"{before}.experts.gate_up_proj"] = np.ascontiguousarray(np.concatenate([gate, up], axis=2).transpose(0, 2, 1))
            fused[f"{before}.experts.down_proj"] = np.ascontiguousarray(down.transpose(0, 2, 1))
    safetensors.numpy.save_file(fused, out / SINGLE)
    loaded = load_hf(out)
    tokens = jnp.asarray(tiny.tokens(2))
    np.testing.assert_array_equal(loaded(tokens), params(tokens))
    assert all(isinstance(part, np.memmap) for part in loaded.layers[1].mlp.experts.up_proj.kernel.get_value().parts)


def test_a_tensor_of_other_experts_than_the_configs_is_refused(tmp_path: Path):
    out = save_hf(tiny.decoder(**sparse.QWEN3_MOE), tmp_path / "out", format="float")
    held = tensors(out) | {"model.layers.0.mlp.experts.gate_up_proj": np.zeros((5, 128, 64), np.float16)}
    safetensors.numpy.save_file(held, out / SINGLE)
    with pytest.raises(CheckpointError, match=r"gate_up_proj has shape \[5, 128, 64\], expected \[4, 128, 64\]"):
        load_hf(out)


def test_a_view_of_all_experts_that_a_torch_file_transposed_is_read(tmp_path: Path):
    params = tiny.decoder(**sparse.QWEN3_MOE)
    out = save_hf(params, tmp_path / "out", format="float")
    held = {name: torch.from_numpy(array) for name, array in tensors(out).items() if ".experts." not in name}
    for index, block in enumerate(params.layers):
        stacks = [block.mlp.experts.gate_proj, block.mlp.experts.up_proj, block.mlp.experts.down_proj]
        gate, up, down = (np.array(stack.kernel.get_value()) for stack in stacks)
        before = f"model.layers.{index}.mlp.experts"
        held[f"{before}.gate_up_proj"] = torch.from_numpy(np.concatenate([gate, up], axis=2)).transpose(1, 2)
        held[f"{before}.down_proj"] = torch.from_numpy(down).transpose(1, 2)
    torch.save(held, out / "pytorch_model.bin")
    (out / SINGLE).unlink()
    tokens = jnp.asarray(tiny.tokens(2))
    np.testing.assert_array_equal(load_hf(out)(tokens), params(tokens))


def test_an_expert_that_is_missing_is_named(tmp_path: Path):
    out = save_hf(tiny.decoder(**sparse.QWEN3_MOE), tmp_path / "out", format="float")
    held = tensors(out)
    del held[f"{GATE.format(2)}.weight"]
    safetensors.numpy.save_file(held, out / SINGLE)
    with pytest.raises(CheckpointError, match=rf"{re.escape(GATE.format(2))}\.weight is missing, expected \[64, 64\]"):
        load_hf(out)


@pytest.mark.parametrize(("form", "sym", "file_format"), [("qwen3_moe", True, "gptq"), ("deepseek", False, "gptq_v2")])
@pytest.mark.filterwarnings("ignore:vLLM refuses")
def test_every_expert_is_packed_in_the_file_and_the_router_is_not(tmp_path: Path, form: str, sym: bool, file_format):
    quantized, report = jgptq.quantize(tiny.decoder(**sparse.FORMS[form]), method="rtn", group_size=32, sym=sym)
    out = save_hf(quantized, tmp_path / "out", format=file_format)
    held = tensors(out)
    for expert in range(4):
        assert {f"{GATE.format(expert)}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")} <= held.keys()
    assert "model.layers.1.mlp.gate.weight" in held
    assert not [name for name in held if ".experts." in name and name.endswith(".weight")]
    assert len([name for name in held if name.endswith("qweight")]) == len(report.rows)
    loaded = load_hf(out)
    assert loaded.quantization == quantized.quantization
    for left, right in zip(quantized.layers, loaded.layers, strict=True):
        for path, linear in left.linears().items():
            pairs = zip(single_linears(path, linear), single_linears(path, right.linears()[path]), strict=True)
            for (name, one), (_, other) in pairs:
                assert isinstance(other.kernel.get_value(), PackedTensor)
                ours, read = one.kernel.get_value().dequantize(), other.kernel.get_value().dequantize()
                np.testing.assert_array_equal(ours, read, err_msg=name)
    tokens = jnp.asarray(tiny.tokens(2))
    np.testing.assert_allclose(jgptq.for_serving(loaded)(tokens), quantized(tokens), atol=1e-4)
    assert "dynamic" not in json.loads((out / "config.json").read_text())["quantization_config"]


@pytest.mark.filterwarnings("ignore:transformers reads no rules")
@pytest.mark.parametrize(("form", "experts"), [("qwen3_moe", "mlp.experts"), ("mixtral", "block_sparse_moe.experts")])
def test_rules_in_a_file_match_experts_one_by_one_and_as_the_one_matrix_that_readers_make_of_them(tmp_path: Path, form, experts):
    rules = {r"-:.*layers\.1\..*experts": {}, r"+:.*layers\.0\..*(down_proj|w2)": {"bits": 8}}
    quantized, _ = jgptq.quantize(tiny.decoder(**sparse.FORMS[form]), method="rtn", group_size=32, rules=rules)
    out = save_hf(quantized, tmp_path / "out")
    dynamic = json.loads((out / "config.json").read_text())["quantization_config"]["dynamic"]
    kinds = ("w1", "w3", "w2") if form == "mixtral" else ("gate_proj", "up_proj", "down_proj")

    def matched(layer: int, name: str) -> list[str]:
        return [key for key in dynamic if re.match(key[2:], f"model.layers.{layer}.{experts}{name}")]

    assert all(len(matched(1, f".{expert}.{kind}")) == 1 for expert in (0, 3) for kind in kinds)
    assert matched(1, "")
    assert all(key.startswith("-:") for key in matched(1, ""))
    assert matched(0, "") == []  # no one width is that of all its linears
    assert [dynamic[key] for key in matched(0, f".3.{kinds[2]}")] == [{"bits": 8}]
    assert matched(0, f".3.{kinds[0]}") == []


@pytest.mark.parametrize("form", ["qwen3_moe", "qwen2_moe", "mixtral"])
def test_experts_in_compressed_tensors_read_back_and_their_routers_are_on_the_list_of_what_is_float(tmp_path: Path, form: str):
    quantized, _ = jgptq.quantize(tiny.decoder(**sparse.FORMS[form]), method="rtn", group_size=32)
    out = save_hf(quantized, tmp_path / "out", format="compressed-tensors")
    loaded = load_hf(out)
    tokens = jnp.asarray(tiny.tokens(2))
    np.testing.assert_array_equal(loaded(tokens), quantized(tokens))
    matrices = {name for name, array in tensors(out).items() if array.ndim == 2 and name.endswith(".weight")}
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert {f"{name}.weight" for name in ignored} == matrices - {"model.embed_tokens.weight"}


def test_rules_for_experts_are_groups_of_compressed_tensors(tmp_path: Path):
    rules = {r"-:.*layers\.1\..*experts": {}, r"+:.*layers\.0\..*experts": {"bits": 8}}
    quantized, _ = jgptq.quantize(tiny.decoder(**sparse.QWEN3_MOE), method="rtn", group_size=32, rules=rules)
    out = save_hf(quantized, tmp_path / "out", format="compressed-tensors")
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    assert {GATE.format(expert) for expert in range(4)} <= set(quantization["ignore"])
    targets = {group["weights"]["num_bits"]: group["targets"] for group in quantization["config_groups"].values()}
    for name in ("mlp.experts.0.gate_proj", "mlp.experts.3.down_proj"):
        assert [bits for bits in (4, 8) for one in targets[bits] if re.match(one[3:], f"model.layers.0.{name}")] == [8]
    tokens = jnp.asarray(tiny.tokens(2))
    np.testing.assert_array_equal(load_hf(out)(tokens), quantized(tokens))


@pytest.mark.parametrize("packed", [False, True], ids=["float", "packed"])
def test_experts_in_orbax_read_back(tmp_path: Path, packed: bool):
    params = tiny.decoder(**sparse.QWEN2_MOE)
    if packed:
        params, _ = jgptq.quantize(params, method="rtn", group_size=32)
    loaded = load_hf(save_hf(params, tmp_path / "out", format="orbax"))
    tokens = jnp.asarray(tiny.tokens(2))
    np.testing.assert_array_equal(loaded(tokens), params(tokens))


def test_the_state_of_a_model_with_experts_that_was_trained_in_jax_is_read(tmp_path: Path):
    import orbax.checkpoint as ocp

    params = tiny.decoder(**sparse.QWEN3_MOE)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((tmp_path / "step").resolve(), nnx.state(params))
    loaded = load_orbax(tmp_path / "step", params.config)
    tokens = jnp.asarray(tiny.tokens(2))
    np.testing.assert_array_equal(loaded(tokens), params(tokens))


@pytest.mark.parametrize("form", sparse.FORMS)
def test_a_config_reads_back_as_it_was_written(form: str):
    config = tiny.config(**sparse.FORMS[form])
    assert config_from_hf(config_to_hf(config)) == config


def test_configs_of_experts_that_cannot_be_are_refused():
    hf = config_to_hf(tiny.config(**sparse.QWEN3_MOE))
    with pytest.raises(CheckpointError, match="a token cannot go to 5 of 4 experts"):
        config_from_hf(hf | {"num_experts_per_tok": 5})
    assert config_from_hf(hf | {"mlp_only_layers": [0, 1]}).sparse_layers == (False, False)


def test_an_abstract_decoder_has_a_leaf_for_each_expert_without_an_array():
    decoder = nnx.eval_shape(lambda: Decoder(tiny.config(**sparse.QWEN3_MOE), rngs=nnx.Rngs(0)))
    shapes = {path: getattr(module, name).get_value().shape for path, module, name in leaves(decoder)}
    assert shapes["layers.0.mlp.experts.3.down_proj"] == (64, 64)
    assert "layers.0.mlp.experts.down_proj" not in shapes

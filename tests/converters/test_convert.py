"""From any format to any other: the same codes, scales and zero points, or an error that says what would be lost."""

import dataclasses
import itertools
import json
from pathlib import Path

import foreign
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import assert_same

import converters
import jgptq
from converters import convert, load_hf, save_hf
from converters.conversion import rounded
from converters.names import leaves
from converters.output.describe import kernels_of
from jgptq.errors import CheckpointError, ConfigError, OutputError
from jgptq.models import Decoder
from jgptq.models.packed import PackedTensor, unpack

pytestmark = pytest.mark.filterwarnings("ignore:vLLM refuses", "ignore:transformers", "ignore:compressed-tensors from 0.20")

PACKED = ("gptq", "gptq_v2", "compressed-tensors", "orbax")


def quantized(sym: bool, **settings) -> Decoder:
    """4 and 8 bits, groups and whole columns, a linear that stays float."""
    rules = {".*down_proj": {"bits": 8}, ".*(gate|up)_proj": {"group_size": -1}, r"-:.*1\.self_attn\.o_proj": {}}
    return jgptq.quantize(tiny.decoder(), method="rtn", sym=sym, group_size=32, rules=rules, **settings)[0]


@pytest.fixture(scope="module")
def symmetric(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One decoder in every format that packs."""
    place, params = tmp_path_factory.mktemp("symmetric"), quantized(sym=True)
    return {name: save_hf(params, place / name, format=name) for name in PACKED}


@pytest.fixture(scope="module")
def asymmetric(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place, params = tmp_path_factory.mktemp("asymmetric"), quantized(sym=False)
    return {name: save_hf(params, place / name, format=name) for name in PACKED[1:]}


def assert_same_codes(left: Decoder, right: Decoder) -> None:
    """The words of codes and zero points, the scales, groups and settings of every linear; words are the same where codes are."""
    for (path, a), (_, b) in zip(kernels_of(left), kernels_of(right), strict=True):
        if isinstance(a, PackedTensor):
            assert (a.bits, a.group_size, a.shape) == (b.bits, b.group_size, b.shape), path
            assert (a.zeros is None, a.group_index is None) == (b.zeros is None, b.group_index is None), path
    assert_same(left, right)
    assert left.quantization == right.quantization


@pytest.mark.parametrize(("source", "target"), itertools.product(PACKED, PACKED))
def test_a_symmetric_model_is_the_same_in_every_format(symmetric: dict, tmp_path: Path, source: str, target: str):
    converted = convert(symmetric[source], tmp_path / "out", target)
    assert_same_codes(load_hf(symmetric["gptq"]), load_hf(converted))


@pytest.mark.parametrize(("source", "target"), itertools.product(PACKED[1:], PACKED[1:]))
def test_an_asymmetric_model_is_the_same_in_every_format_that_holds_it(
    asymmetric: dict, tmp_path: Path, source: str, target: str
):
    converted = convert(asymmetric[source], tmp_path / "out", target)
    assert_same_codes(load_hf(asymmetric["gptq_v2"]), load_hf(converted))


@pytest.mark.parametrize("target", PACKED[1:])
def test_awq_converts_to_every_format_that_holds_zero_points(tmp_path: Path, target: str):
    source, _ = foreign.awq_folder(tmp_path / "awq")
    assert_same_codes(load_hf(source), load_hf(convert(source, tmp_path / "out", target)))


@pytest.mark.parametrize("target", ["gptq", "awq"])
def test_what_a_format_cannot_hold_is_refused_and_nothing_is_written(tmp_path: Path, target: str):
    source, _ = foreign.awq_folder(tmp_path / "awq")
    with pytest.raises(ConfigError, match=r"use 'gptq_v2'" if target == "gptq" else "format must be one of gptq, "):
        convert(source, tmp_path / "out", target)
    assert [path.name for path in tmp_path.iterdir()] == ["awq"]


def test_stored_groups_survive_between_formats(tmp_path: Path):
    params, _ = jgptq.quantize(tiny.decoder(), tiny.tokens(), preset="fast", group_size=32, order="desc_act")
    assert any(kernel.group_index is not None for _, kernel in kernels_of(params) if isinstance(kernel, PackedTensor))
    folder = save_hf(params, tmp_path / "gptq")
    for number, target in enumerate(("compressed-tensors", "orbax", "gptq_v2", "gptq")):
        folder = convert(folder, tmp_path / str(number), target)
        assert_same_codes(params, load_hf(folder))


def test_a_quantized_model_expands_to_float32_without_rounding(symmetric: dict, tmp_path: Path):
    out = convert(symmetric["compressed-tensors"], tmp_path / "out", "float")
    before, after = load_hf(symmetric["gptq"]), load_hf(out)
    assert after.quantization is None
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"
    for (path, packed), (_, kernel) in zip(kernels_of(before), kernels_of(after), strict=True):
        if isinstance(packed, PackedTensor):
            codes_kn, zero_gn = (np.asarray(part, np.float64) for part in unpack(packed))
            rows = packed.shape[0] // packed.scales.shape[0]
            scale_kn, zero_kn = (np.repeat(np.asarray(part, np.float64), rows, axis=0) for part in (packed.scales, zero_gn))
            np.testing.assert_array_equal(np.asarray(kernel, np.float64), scale_kn * (codes_kn - zero_kn), err_msg=path)
    tokens = jnp.asarray(tiny.tokens(2))
    np.testing.assert_allclose(before(tokens), after(tokens), atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_is_refused_unless_it_is_asked_for(symmetric: dict, tmp_path: Path, dtype: str):
    with pytest.raises(ConfigError, match=rf"{dtype} would round .*q_proj \(float16 scale times 4-bit code: 15 significant bits"):
        convert(symmetric["gptq"], tmp_path / "out", "float", dtype=dtype)
    assert list(tmp_path.iterdir()) == []
    out = load_hf(convert(symmetric["gptq"], tmp_path / "out", "float", dtype=dtype, lossy=True))
    assert {str(getattr(module, attribute).get_value().dtype) for _, module, attribute in leaves(out)} == {dtype}


def test_a_float_checkpoint_is_cast_where_its_dtype_holds_it(tmp_path: Path):
    folder = tiny.folder(tmp_path / "model")
    wide = load_hf(convert(folder, tmp_path / "wide", "float", dtype="float32"))
    np.testing.assert_array_equal(wide.norm.scale.get_value(), np.asarray(tiny.decoder().norm.scale.get_value(), np.float32))
    with pytest.raises(ConfigError, match=r"bfloat16 would round 21 tensors: model\.embed_tokens \(float16\)"):
        convert(folder, tmp_path / "narrow", "float", dtype="bfloat16")
    assert_same(tiny.decoder(), load_hf(convert(folder, tmp_path / "same", "float")))


def test_a_scale_whose_range_a_dtype_does_not_hold_counts_as_rounded():
    params, _ = jgptq.quantize(tiny.decoder(), method="rtn", group_size=32, bits=2)
    assert not any("scale" in phrase for phrase in rounded(params, "float32"))
    linear = params.layers[0].mlp.down_proj
    kernel = linear.kernel.get_value()
    linear.kernel.set_value(dataclasses.replace(kernel, scales=kernel.scales.astype(jnp.bfloat16)))
    (phrase,) = [phrase for phrase in rounded(params, "float16") if "bfloat16" in phrase]  # 8 + 2 bits would fit into 11
    assert phrase.startswith("model.layers.0.mlp.down_proj (bfloat16 scale")


def test_a_float_checkpoint_cannot_become_codes(tmp_path: Path):
    with pytest.raises(ConfigError, match="quantize it first"):
        convert(tiny.folder(tmp_path / "model"), tmp_path / "out", "gptq")


def test_a_dtype_belongs_to_float_files(symmetric: dict, tmp_path: Path):
    with pytest.raises(ConfigError, match="dtype casts the tensors of format 'float'; 'gptq_v2' keeps"):
        convert(symmetric["gptq"], tmp_path / "out", "gptq_v2", dtype="float32")
    with pytest.raises(ConfigError, match="dtype must be one of float16, bfloat16, float32, found 'int8'"):
        convert(symmetric["gptq"], tmp_path / "out", "float", dtype="int8")


def test_a_folder_that_exists_is_kept_unless_overwriting(symmetric: dict, tmp_path: Path):
    out = convert(symmetric["gptq"], tmp_path / "out", "orbax")
    for target in ("orbax", "gptq_v2"):
        with pytest.raises(OutputError, match="--overwrite"):
            convert(symmetric["gptq"], out, target)
    convert(symmetric["gptq"], out, "gptq_v2", overwrite=True)
    assert not (out / "orbax").exists()


def test_the_losses_of_a_run_stay_in_the_card_of_its_copies(tmp_path: Path):
    params = load_hf(tiny.folder(tmp_path / "model"))
    sink = converters.FolderSink(tmp_path / "out", params, jgptq.QuantizeConfig(group_size=32), tiny.tokens())
    folder = sink.finish(*jgptq.quantize(params, tiny.tokens(), group_size=32, sink=sink))
    copy = convert(folder, tmp_path / "copy", "compressed-tensors")
    losses = [path.joinpath("README.md").read_text().partition("## Loss")[2].partition("## Use")[0] for path in (folder, copy)]
    assert losses[0] == losses[1] != ""
    assert [path.joinpath("README.md").read_text().partition("# ")[2].splitlines()[0] for path in (folder, copy)] == [
        "model, 4 bit"
    ] * 2
    (folder / "quantize_report.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a report of this version"):
        convert(folder, tmp_path / "other", "gptq_v2")


def test_a_quantized_checkpoint_is_not_quantized_again_and_the_error_says_what_to_do(symmetric: dict, tmp_path: Path):
    loaded = load_hf(symmetric["gptq"])
    with pytest.raises(ConfigError, match=rf"quantized already.*jgptq convert {symmetric['gptq']} OUT --format float"):
        jgptq.quantize(loaded, method="rtn", group_size=32)
    expanded = load_hf(convert(symmetric["gptq"], tmp_path / "float", "float"))
    again, _ = jgptq.quantize(expanded, method="rtn", group_size=32)
    assert again.quantization is not None

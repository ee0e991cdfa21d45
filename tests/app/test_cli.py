"""The command line, as a user meets it."""

import itertools
import json
import re
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tiny
from typer.testing import CliRunner

from converters import load_hf
from jgptq.app.cli import app

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*fewer than 128 rows", "ignore:vLLM refuses", "ignore:transformers reads no rules"
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.folder(tmp_path / "model")


@pytest.fixture
def calib(tmp_path: Path) -> str:
    np.save(tmp_path / "calib.npy", tiny.tokens(24).reshape(-1))
    return str(tmp_path / "calib.npy")


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    return result.exit_code, result.output


def quantize(model: Path, out: Path, calib: str, *more: object) -> tuple[int, str]:
    return run("quantize", model, out, "--calib", calib, "--group-size", 32, "--seq-len", 16, "--samples", 24, *more)


def test_quantize_then_eval(model: Path, calib: str, tmp_path: Path):
    code, output = quantize(model, tmp_path / "out", calib)
    assert code == 0, output
    assert "layers.1.mlp.down_proj" in output
    assert "14 linears packed" in output
    code, output = run("eval", tmp_path / "out", "--data", calib, "--seq-len", 16, "--json")
    assert code == 0, output
    assert output.count("\n") == 1
    fields = json.loads(output)
    assert fields["tokens"] == 24 * 15
    assert fields["perplexity"] == pytest.approx(np.exp(fields["nll"] / fields["tokens"]))
    code, output = run("eval", tmp_path / "out", "--data", calib, "--seq-len", 16, "--stride", 8)
    assert re.match(r"perplexity \d+\.\d+ over 383 tokens", output)


def test_explicit_options_replace_those_of_a_preset_and_all_are_reachable(tmp_path: Path, model: Path, calib: Path):
    options = {"--preset": "best", "--tune": 1, "--refine": 1, "--scale": "mse", "--order": "static", "--method": "gptq"}
    options |= {"--target-shift": 0.5, "--residual-shift": 0.25, "--damping": 0.02}
    flags = [part for option in options.items() for part in option]
    code, output = quantize(model, tmp_path / "out", calib, *flags, "--refit", "--float64")
    assert code == 0, output
    assert "tuning: divergence from the float model" in output
    report = json.loads((tmp_path / "out" / "quantize_report.json").read_text())
    assert report["tuning"]["steps"] == 2  # one pass over two batches
    for name, value in options.items():
        if name != "--preset":
            assert report["config"][name.lstrip("-").replace("-", "_")] == value
    assert report["config"]["refit"] is report["config"]["float64"] is True
    code, output = quantize(model, tmp_path / "other", calib, "--preset", "slow")
    assert code == 1
    assert "preset must be one of ('fast', 'balanced', 'best')" in output


@pytest.mark.parametrize(
    "options",
    [
        ["--bits", 3, "--asym", "--format", "gptq_v2", "--order", "none"],
        ["--bits", 8, "--sym", "--dtype", "bfloat16", "--seed", 3, "--damping", 0.05],
        ["--method", "rtn", "--bits", 2, "--max-shard-size", "20KB", "--batch-size", 4],
    ],
)
def test_every_option_reaches_the_files(model: Path, calib: str, tmp_path: Path, options: list):
    code, output = quantize(model, tmp_path / "out", calib, *options)
    assert code == 0, output
    chosen = dict(itertools.pairwise(options))
    loaded = load_hf(tmp_path / "out").quantization
    report = json.loads((tmp_path / "out" / "quantize_report.json").read_text())
    assert loaded.bits == chosen["--bits"] == report["config"]["bits"]
    assert loaded.sym == ("--asym" not in options)
    assert loaded.method == chosen.get("--method", "gptq")
    assert loaded.order == chosen.get("--order", "group")
    assert loaded.damping == chosen.get("--damping", 0.01)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == ("--max-shard-size" in options)


def test_rules_and_the_head_reach_the_files(model: Path, calib: str, tmp_path: Path):
    rules = tmp_path / "rules.json"
    rules.write_text('{"-:.*o_proj": {}, "+:.*down_proj": {"bits": 8}, "lm_head": {"method": "rtn"}}')
    code, output = quantize(model, tmp_path / "out", calib, "--rules", rules, "--lm-head")
    assert code == 0, output
    assert "13 linears packed" in output
    loaded = load_hf(tmp_path / "out")
    assert [(rule.skip, rule.overrides.get("bits"), rule.overrides.get("method")) for rule in loaded.quantization.rules] == [
        (True, None, None),
        (False, 8, None),
        (False, None, "rtn"),
    ]
    assert [block.mlp.down_proj.kernel.get_value().bits for block in loaded.layers] == [8, 8]
    assert loaded.lm_head.kernel.get_value().bits == 4
    assert not hasattr(loaded.layers[0].self_attn.o_proj.kernel.get_value(), "bits")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected a JSON file of rules"),
        ("{", "is not JSON"),
        ("[]", "rules must be a dict"),
        ('{"a": {}, "a": {"bits": 8}}', "'a' occurs twice"),
        ('{"a": {"bit": 8}}', "unknown keys bit; known are bits, group_size"),
        ('{"(": {}}', "'(': missing )"),
        ('{"a": {"bits": 5}}', "rule 'a': bits must be one of"),
        ('{".*q_proj": {"bits": 8}}', "different settings"),
    ],
)
def test_rules_that_cannot_be_used_are_one_message(model: Path, calib: str, tmp_path: Path, text: str | None, message: str):
    rules = tmp_path / "rules.json"
    if text is not None:
        rules.write_text(text)
    code, output = quantize(model, tmp_path / "out", calib, "--rules", rules)
    assert code == 1
    assert output.startswith("error: ")
    assert message in output
    assert not list(tmp_path.glob("out*"))


def test_seed_chooses_other_samples(model: Path, calib: str, tmp_path: Path):
    files = []
    for seed in (0, 0, 1):
        out = tmp_path / f"out{len(files)}"
        assert (
            run("quantize", model, out, "--calib", calib, "--group-size", 32, "--seq-len", 16, "--samples", 4, "--seed", seed)[0]
            == 0
        )
        files.append((out / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "MODEL", "OUT", "--group-size", 32], "needs calibration tokens"),
        (["quantize", "MODEL", "OUT", "--calib", "CALIB", "--seq-len", 16], "group_size 128 does not divide K"),
        (["quantize", "MODEL", "OUT", "--calib", "CALIB", "--bits", 5], "bits must be one of"),
        (["quantize", "MODEL", "OUT", "--calib", "CALIB", "--asym"], "use 'gptq_v2'"),
        (
            ["quantize", "MODEL", "OUT", "--calib", "CALIB", "--seq-len", 16, "--format", "float"],
            "written as one of gptq, gptq_v2, compressed-tensors, found 'float'",
        ),
        (["quantize", "MODEL", "MODEL", "--calib", "CALIB"], "exists; choose another folder"),
        (["quantize", "MODEL", "OUT", "--calib", "CALIB"], "expected at least seq_len=2048 tokens"),
        (["quantize", "MODEL", "OUT", "--calib", "nothing.npy"], "no such file"),
        (["quantize", "NOWHERE", "OUT", "--calib", "CALIB"], "not a folder"),
        (["eval", "MODEL", "--data", "CALIB", "--dtype", "int4"], "known are auto, float32, bfloat16"),
        (["demo", "--model", "MODEL"], "needs --calib and --data"),
        (["convert", "MODEL", "OUT", "--format", "gptq"], "quantize it first"),
        (
            ["convert", "MODEL", "OUT", "--format", "marlin"],
            "format must be one of gptq, gptq_v2, compressed-tensors, float, orbax",
        ),
        (["push", "NOWHERE", "me/model"], "expected config.json and one of"),
    ],
)
def test_an_error_is_one_message_and_leaves_no_folder(model: Path, calib: str, tmp_path: Path, arguments: list, message: str):
    places = {"MODEL": model, "OUT": tmp_path / "out", "CALIB": calib, "NOWHERE": tmp_path / "no_model"}
    code, output = run(*(places.get(argument, argument) for argument in arguments))
    assert code == 1
    assert output.startswith("error: ")
    assert message in output
    assert "Traceback" not in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calib.npy", "model"]


def test_convert_writes_another_format_and_eval_gives_the_same_perplexity(model: Path, calib: str, tmp_path: Path):
    code, output = quantize(model, tmp_path / "out", calib, "--method", "rtn")
    assert code == 0, output
    code, output = run("convert", tmp_path / "out", tmp_path / "ct", "--format", "compressed-tensors")
    assert (code, output) == (0, f"wrote {tmp_path / 'ct'} as compressed-tensors\n")
    scores = [json.loads(run("eval", tmp_path / name, "--data", calib, "--seq-len", 16, "--json")[1]) for name in ("out", "ct")]
    assert scores[0]["perplexity"] == scores[1]["perplexity"]
    code, output = run("convert", tmp_path / "out", tmp_path / "half", "--format", "float", "--dtype", "float16")
    assert code == 1
    assert "pass --lossy" in output
    code, output = run("convert", tmp_path / "out", tmp_path / "half", "--format", "float", "--dtype", "float16", "--lossy")
    assert code == 0, output
    code, output = run("convert", tmp_path / "ct", tmp_path / "half", "--format", "gptq", "--max-shard-size", "20KB")
    assert code == 1
    assert "pass --overwrite" in output
    code, output = run(
        "convert", tmp_path / "ct", tmp_path / "half", "--format", "gptq", "--max-shard-size", "20KB", "--overwrite"
    )
    assert code == 0, output
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 1


def test_quantize_refuses_a_quantized_model_before_it_reads_any_text(model: Path, calib: str, tmp_path: Path):
    assert quantize(model, tmp_path / "out", calib, "--method", "rtn", "--format", "compressed-tensors")[0] == 0
    code, output = quantize(tmp_path / "out", tmp_path / "again", "nothing.npy")
    assert code == 1
    assert f"jgptq convert {tmp_path / 'out'} OUT --format float" in output


def test_push_uploads_a_folder_and_prints_where_it_is(model: Path, monkeypatch: pytest.MonkeyPatch):
    from converters import hub

    calls = []
    monkeypatch.setattr(hub, "push_to_hub", lambda *args, **named: calls.append((args, named)) or "https://hub/commit/1")
    code, output = run("push", model, "me/model", "--private", "--revision", "int4", "--message", "4 bits")
    assert (code, output) == (0, "https://hub/commit/1\n")
    assert calls == [((model, "me/model"), {"private": True, "revision": "int4", "message": "4 bits"})]


@pytest.mark.parametrize("command", ["quantize", "eval", "convert", "push", "demo"])
def test_help_has_an_example(command: str):
    code, output = run(command, "--help")
    assert code == 0
    assert f"Example: jgptq {command}" in output


def test_demo_shows_the_order_and_reads_its_export_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from jgptq import tinycode
    from jgptq.app import demo

    if not Path(tinycode.FOLDER, "model.safetensors").exists():
        pytest.fail("the embedded model is missing: python -m jgptq.tinycode.train")
    monkeypatch.setattr(demo, "EVALUATION_TOKENS", 8192)
    code, output = run("demo", "--samples", 32, "--out", tmp_path / "export")
    assert code == 0, output
    assert output.count("RTN") >= 3
    reloaded, kept = re.search(r"read back: perplexity ([\d.]+), in memory ([\d.]+)", output).groups()
    assert reloaded == kept
    assert load_hf(tmp_path / "export").quantization.bits == 4


def test_a_revision_reaches_the_hub_from_both_commands(model: Path, calib: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def fetch(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    code, output = quantize(Path("someone/model"), tmp_path / "out", calib, "--method", "rtn", "--revision", "v1")
    assert code == 0, output
    code, output = run("eval", "someone/model", "--data", calib, "--seq-len", 16, "--revision", "v2")
    assert code == 0, output
    assert asked == [("someone/model", "v1"), ("someone/model", "v2")]


def test_a_quantized_folder_is_not_quantized_again(model: Path, calib: str, tmp_path: Path):
    quantize(model, tmp_path / "out", calib, "--method", "rtn")
    code, output = quantize(tmp_path / "out", tmp_path / "again", calib)
    assert code == 1
    assert output == f"error: {tmp_path / 'out'}: the decoder is quantized already; start from the float checkpoint\n"
    assert not list(tmp_path.glob("again*"))

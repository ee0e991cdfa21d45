"""What each option contributes: excess log-perplexity over the float model, by bits, grid and group, against GPTQModel's best.

    python benchmarks/bench_quality.py [--stories FOLDER] [--peer-python .venv-interop/bin/python]
        [--peer-exports FOLDER] [--options best,balanced] [--bits 4,3,2] [--formats REGEX]

On the embedded model at groups of 128 and 32, and, where its folder is given, on a trained Llama of 260 thousand parameters at
groups of 32 (its MLP is 172 wide, no multiple of 32, and stays float on both sides). Both sides calibrate on the same 65,536
tokens and are scored on the same held-out text, by the same code, in float32; GPTQModel's export is read back for that. Its
settings are those that its own documentation advises for quality: order inside groups, mse=2.4, and gptaq off, with alpha 0.25
and with alpha 1; ours is compared with the best of the three, selected by the figure itself.

The result is written after every cell, and cells that it holds are not measured again: delete the file to start afresh.
`quality_cpu.md` has the same as tables.
"""

import argparse
import json
import math
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, circumstances, write_result, write_tokenizer

import jgptq
from converters import load_hf
from jgptq import tinycode
from jgptq.app.demo import demo_tokens, sources
from jgptq.settings.presets import make_config

NAME = "quality_cpu"
PLAIN = {"preset": "fast", "scale": "minmax"}
OPTIONS: dict[str, dict[str, Any]] = {
    "best": {"preset": "best"},
    "best, damping 0.05": {"preset": "best", "damping": 0.05},
    "best, tune 2": {"preset": "best", "tune": 2.0},
    "balanced": {},
    "fast": {"preset": "fast"},
    "rtn": {"method": "rtn"},
    "plain gptq, order none": PLAIN | {"order": "none"},
    "plain gptq, order group": PLAIN,
    "plain gptq, order static": PLAIN | {"order": "static"},
    "plain gptq, order desc_act": PLAIN | {"order": "desc_act"},
    "fast, order static": {"preset": "fast", "order": "static"},
    "fast, scale mse": {"preset": "fast", "scale": "mse"},
    "fast, refit": {"preset": "fast", "refit": True},
    "fast, refine 3": {"preset": "fast", "refine": 3},
    "fast, tune 0.75": {"preset": "fast", "tune": 0.75},
    "gptaq": {"method": "gptaq"},
    "gptaq, alpha 0.25": {"method": "gptaq", "target_shift": 0.25},
    "qronos": {"method": "qronos"},
    "balanced, order static": {"order": "static"},
    "balanced, no residual": {"residual_shift": 0.0},
    "balanced, half shift": {"target_shift": 0.5, "residual_shift": 0.5},
    "balanced, refit": {"refit": True},
    "balanced, refine 3": {"refine": 3},
    "balanced, tune 0.75": {"tune": 0.75},
}
PEERS = {"gptaq off": None, "gptaq alpha 0.25": 0.25, "gptaq alpha 1": 1.0}
LIMITS = {32: {4: 0.8, 3: 0.7, 2: 0.65}, 128: {4: 0.85, 3: 0.85, 2: 0.75}}
COSTS_WHEN_SERVED = "plain gptq, order desc_act"


def cases(stories: Path | None) -> Iterator[tuple[str, str, int, np.ndarray, np.ndarray, list[str]]]:
    """Name, folder, group size, calibration rows, evaluation tokens, and what stays float on both sides."""
    calib, tokens = demo_tokens(tinycode.FOLDER, *sources(tinycode.FOLDER, None, None), 256, tinycode.SEQ_LEN)
    for group_size in (128, 32):
        yield "tinycode", tinycode.FOLDER, group_size, calib, tokens, []
    if stories is not None:
        files = (str(stories / name) for name in ("calib_ids.npy", "eval_ids.npy"))
        calib, tokens = demo_tokens(str(stories), *files, 256, 256)
        yield "stories260k", str(stories), 32, calib, tokens, [r".*\.mlp\..*"]


def peer_exports(python: Path, folder: str, calib: np.ndarray, settings: dict[str, dict[str, Any]], out: Path) -> None:
    """Runs GPTQModel with every setting that has no folder in `out` yet."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        model = place / "model"
        model.mkdir()
        for file in Path(folder).glob("*.*"):
            (model / file.name).symlink_to(file.resolve())
        if not (model / "tokenizer.json").exists():
            write_tokenizer(model)
        np.save(place / "tokens.npy", calib)
        (place / "settings.json").write_text(json.dumps(settings))
        script = Path(__file__).parent / "peer_quality.py"
        command = [python.absolute(), script.resolve(), model, place / "tokens.npy", place / "settings.json", out.absolute()]
        subprocess.run(command, check=True, cwd=scratch, stdout=subprocess.DEVNULL)


def log_perplexity(params: Any, tokens: np.ndarray) -> float:
    """Mean negative log-likelihood per token, windows of 256."""
    return math.log(jgptq.perplexity(params, tokens, 256))


def measured(folder: str, calib: np.ndarray, tokens: np.ndarray, settings: dict[str, Any], base: float) -> dict[str, Any]:
    """One cell of jgptq."""
    started = time.process_time()
    quantized, report = jgptq.quantize(load_hf(folder, "float32"), calib, config=make_config(settings))
    used = time.process_time() - started
    rows = [row for row in report.rows if row.quantized]
    return {
        "excess": log_perplexity(quantized, tokens) - base,
        "cpu_seconds": round(used, 1),  # of all cores together: less sensitive than wall time to other load on the machine
        "loss_over_rtn": sum(row.loss or 0 for row in rows) / sum(row.rtn_loss or 0 for row in rows),
        "linears_above_rtn": [row.name for row in report.worse_than_rtn],
    }


def verdicts(formats: dict[str, Any]) -> dict[str, Any]:
    """Our best setting that costs nothing when served, and each preset, over GPTQModel's best, for every format of both."""
    ratios = {}
    for key, cells in formats.items():
        ours = {name: cell["excess"] for name, cell in cells["ours"].items() if name != COSTS_WHEN_SERVED}
        theirs = [cell["excess"] for cell in cells["gptqmodel"].values()]
        if ours and theirs:
            free = min(ours, key=lambda name: ours[name])
            least = min(theirs)
            presets = {name: ours[name] / least for name in ("fast", "balanced", "best") if name in ours}
            ratios[key] = {"best_free": free, "ratio": ours[free] / least, "limit": cells["limit"], **presets}
    return ratios


def mean_ratio(formats: list[dict[str, Any]], option: str) -> str:
    """Geometric mean of an option's excess over GPTQModel's best, with the number of formats where some are not measured."""
    pairs = [
        (cells["ours"][option]["excess"], min(cell["excess"] for cell in cells["gptqmodel"].values()))
        for cells in formats
        if option in cells["ours"] and cells["gptqmodel"]
    ]
    if not pairs or min(min(pair) for pair in pairs) <= 0:
        return ""
    mean = math.exp(sum(math.log(ours / theirs) for ours, theirs in pairs) / len(pairs))
    return f"{mean:.2f}" + ("" if len(pairs) == len(formats) else f" ({len(pairs)} of {len(formats)})")


def tables(formats: dict[str, Any]) -> str:
    """Markdown: every option's excess over GPTQModel's best at each width, and the excess of every cell."""

    def measured_anywhere(option: str) -> bool:
        return any(option in cells["ours"] for cells in formats.values())

    wide = {bits: [cells for key, cells in formats.items() if f"{bits} bit" in key] for bits in (4, 3, 2)}
    lines = ["| option | 4 bit | 3 bit | 2 bit |", "|---|---|---|---|"]
    lines += [
        f"| {option} | " + " | ".join(mean_ratio(wide[bits], option) for bits in wide) + " |"
        for option in OPTIONS
        if measured_anywhere(option)
    ]
    for model in dict.fromkeys(key.split(" bit")[0].rsplit(", ", 1)[0] for key in formats):
        order = [f"{model}, {bits} bit {grid}" for bits in wide for grid in ("sym", "asym")]
        keys = [key for key in order if key in formats]
        heads = [key.removeprefix(model + ", ") for key in keys]
        lines += ["", f"{model}: excess log-perplexity over float, in thousandths", "", f"| | {' | '.join(heads)} |"]
        lines += ["|---" * (len(keys) + 1) + "|"]
        for side, names in (("gptqmodel", list(PEERS)), ("ours", list(filter(measured_anywhere, OPTIONS)))):
            for name in names:
                values = [formats[key][side][name]["excess"] * 1000 if name in formats[key][side] else None for key in keys]
                row = " | ".join("" if value is None else f"{value:.1f}" for value in values)
                lines += [f"| {'GPTQModel, ' if side == 'gptqmodel' else ''}{name} | {row} |"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--peer-exports", type=Path, help="folder for GPTQModel's exports; those it holds are not made again")
    parser.add_argument("--options", default=",".join(OPTIONS).replace(", ", "; "), help="separated by commas")
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--formats", default="", help="regex of the formats to measure, such as 'group 32, 3 bit'")
    args = parser.parse_args()
    options = [name.replace("; ", ", ") for name in args.options.split(",")]
    path = RESULTS / f"{NAME}.json"
    result = json.loads(path.read_text()) if path.exists() else {"float": {}, "formats": {}}

    def write() -> None:
        # Device and versions are those of the last cell; every cell records the commit that it was measured at.
        write_result(NAME, {**circumstances(), **result, "verdicts": verdicts(result["formats"])})
        (RESULTS / f"{NAME}.md").write_text(tables(result["formats"]))

    for model, folder, group_size, calib, tokens, skip in cases(args.stories):
        if model not in result["float"]:
            result["float"][model] = log_perplexity(load_hf(folder, "float32"), tokens)
        base = result["float"][model]
        for bits in map(int, args.bits.split(",")):
            for sym in (True, False):
                key = f"{model}, group {group_size}, {bits} bit {'sym' if sym else 'asym'}"
                if not re.search(args.formats, key):
                    continue
                blank = {"limit": LIMITS[group_size][bits], "ours": {}, "gptqmodel": {}}
                cells = result["formats"].setdefault(key, blank)
                if args.peer_python is not None and len(cells["gptqmodel"]) < len(PEERS):
                    out = args.peer_exports or Path(tempfile.mkdtemp())
                    common = {
                        "bits": bits,
                        "group_size": group_size,
                        "sym": sym,
                        "mse": 2.4,
                        "act_group_aware": True,
                        "skip": skip,
                    }
                    wanted = {f"{key}, {name}": common | {"gptaq_alpha": alpha} for name, alpha in PEERS.items()}
                    peer_exports(args.peer_python, folder, calib, wanted, out)
                    for name in PEERS:
                        export = out / f"{key}, {name}"
                        excess = log_perplexity(load_hf(str(export), "float32"), tokens) - base
                        seconds = float((export / "seconds.txt").read_text())
                        cells["gptqmodel"][name] = {"excess": excess, "seconds": seconds}
                    write()
                for name in options:
                    if name in cells["ours"]:
                        continue
                    settings = {"bits": bits, "group_size": group_size, "sym": sym} | OPTIONS[name]
                    cell = measured(folder, calib, tokens, settings, base)
                    cells["ours"][name] = cell | {"commit": circumstances()["commit"]}
                    print(f"{key}, {name}: {cell['excess']:.5f} ({cell['cpu_seconds']} s)", flush=True)
                    write()
    for key, verdict in verdicts(result["formats"]).items():
        print(key, {name: round(value, 3) if isinstance(value, float) else value for name, value in verdict.items()})


if __name__ == "__main__":
    main()

"""What each bit width loses on two trained models: float, round-to-nearest and GPTQ at 4, 3 and 2 bits, as in `jgptq demo`.

    pip install -e '.[bench]' && python benchmarks/bench_demo.py [--stories FOLDER]

The embedded model at group 128, calibrated on 256 samples of 256 tokens of the standard library and scored on held-out files of
it; and, where its folder is given, a trained Llama of 260 thousand parameters at group 32 (its MLP is 172 wide, no multiple of
32, and stays float). Writes the figures and a picture of them.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, circumstances, write_result

from converters import load_hf
from jgptq import tinycode
from jgptq.app.demo import check_order, compare, demo_tokens, sources

BITS = (4, 3, 2)


def rows(folder: str, calib: np.ndarray, tokens: np.ndarray, group_size: int) -> list[dict[str, Any]]:
    """The demonstration's table as JSON values."""
    variants = [variant for variant, _ in compare(load_hf(folder), calib, tokens, 256, group_size, BITS)]
    check_order(variants)
    return [dataclasses.asdict(variant) for variant in variants]


def draw(models: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Excess of the perplexity over the float model's, by bits: one panel a model."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(models), figsize=(4.2 * len(models), 3.2), squeeze=False)
    for axis, (name, variants) in zip(axes[0], models.items(), strict=True):
        base = variants[0]["perplexity"]
        for method, colour in (("RTN", "#b0b0b0"), ("GPTQ", "#1f6fb4")):
            points = [row for row in variants if row["method"] == method]
            excess = [100 * (row["perplexity"] / base - 1) for row in points]
            at = np.arange(len(BITS)) + (-0.2 if method == "RTN" else 0.2)
            axis.bar(at, excess, 0.38, label=method, color=colour)
            for x, y in zip(at, excess, strict=True):
                axis.annotate(f"{y:.1f}", (x, y), ha="center", va="bottom", fontsize=8)
        axis.set_yscale("log")
        axis.set_xticks(range(len(BITS)), [f"{bits} bit" for bits in BITS])
        axis.set_title(f"{name} (float: {base:.2f})", fontsize=10)
        axis.set_ylim(top=axis.get_ylim()[1] * 2)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("perplexity above float, %")
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path)
    args = parser.parse_args()
    calib, tokens = demo_tokens(tinycode.FOLDER, *sources(tinycode.FOLDER, None, None), 256, tinycode.SEQ_LEN)
    models = {"tinycode, group 128": rows(tinycode.FOLDER, calib, tokens, 128)}
    if args.stories is not None:
        files = (str(args.stories / name) for name in ("calib_ids.npy", "eval_ids.npy"))
        calib, tokens = demo_tokens(str(args.stories), *files, 256, 256)
        models["stories260k, group 32"] = rows(str(args.stories), calib, tokens, 32)
    print("wrote", write_result("demo_cpu", {**circumstances(), "models": models}))
    draw(models, RESULTS / "demo.png")


if __name__ == "__main__":
    main()

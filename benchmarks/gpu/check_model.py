"""The whole job on the GPU: the embedded model quantized, against codes and perplexity of the CPU; and the demonstration.

    python benchmarks/gpu/check_model.py quantize
    python benchmarks/gpu/check_model.py demo

A process that sees the CPU alone quantizes the same model with the same tokens. Activations differ in their last bits, so that
codes within rounding of a tie differ, and after them others of their columns: they are counted, by linear. Perplexities must
agree to 1 %. The demonstration compares float, round-to-nearest and GPTQ at each width, and fails where GPTQ is not between the
others.
"""

import dataclasses
from pathlib import Path
from typing import Any

import paths  # isort: skip  # noqa: F401
import jax
import numpy as np
from on_cpu import start_on_cpu
from records import Record, arguments, require_gpu

import jgptq
from converters import load_hf
from jgptq import tinycode
from jgptq.app.demo import check_order, compare, demo_tokens, sources
from jgptq.evaluate.perplexity import perplexity
from jgptq.models.packed import PackedTensor, unpack

PRESETS = ("fast", "balanced")
PERPLEXITY = 0.01


def tokens(rehearse: bool) -> tuple[np.ndarray, np.ndarray]:
    """Calibration rows, and an evaluation stream."""
    texts = sources(tinycode.FOLDER, None, None)
    if not rehearse:
        return demo_tokens(tinycode.FOLDER, *texts, 128, tinycode.SEQ_LEN)
    calib, stream = demo_tokens(tinycode.FOLDER, *(text[:4] for text in texts), 4, tinycode.SEQ_LEN)
    return calib, stream[:1024]


def quantized(preset: str, rehearse: bool) -> dict[str, np.ndarray]:
    """The codes of every linear, and the perplexity, from this process' device."""
    calib, stream = tokens(rehearse)
    decoder, _ = jgptq.quantize(load_hf(tinycode.FOLDER), calib, preset=preset, bits=4, group_size=128, progress=False)
    leaves = jax.tree_util.tree_flatten_with_path(decoder, is_leaf=lambda leaf: isinstance(leaf, PackedTensor))[0]
    codes = {jax.tree_util.keystr(path): np.asarray(unpack(leaf)[0]) for path, leaf in leaves if isinstance(leaf, PackedTensor)}
    return codes | {"perplexity": np.asarray(perplexity(decoder, stream, tinycode.SEQ_LEN))}


def compared(preset: str, rehearse: bool) -> dict[str, Any]:
    """One preset on this device and on the CPU."""
    from_cpu = start_on_cpu(__file__, "quantize", "--preset", preset, *(["--rehearse"] if rehearse else []))
    here, there = quantized(preset, rehearse), from_cpu()
    values = [float(side.pop("perplexity")) for side in (here, there)]
    rows = []
    for name, codes_kn in here.items():
        differ_kn = codes_kn != there[name]
        columns = differ_kn.any(axis=0)
        first_n = np.argmax(differ_kn, axis=0)[columns]
        steps_n = np.abs(codes_kn.astype(int) - there[name])[first_n, np.flatnonzero(columns)]
        rows.append(
            {
                "linear": name,
                "codes": codes_kn.size,
                "codes_that_differ": int(differ_kn.sum()),
                "columns_that_differ": int(columns.sum()),
                "columns_whose_first_difference_is_one_step": int((steps_n == 1).sum()),
            }
        )
    differ = sum(row["codes_that_differ"] for row in rows) / sum(row["codes"] for row in rows)
    return {
        "preset": preset,
        "perplexity": values[0],
        "perplexity_cpu": values[1],
        "codes_that_differ": differ,
        "right": bool(abs(values[0] / values[1] - 1) < PERPLEXITY and here.keys() == there.keys()),
        "linears": rows,
    }


def demo(record: Record, rehearse: bool) -> None:
    """The demonstration, row by row."""
    calib, stream = tokens(rehearse)
    bits = (4,) if rehearse else (4, 3, 2)
    variants = []
    for variant, _ in compare(load_hf(tinycode.FOLDER), calib, stream, tinycode.SEQ_LEN, 128, bits):
        variants.append(variant)
        record.add("variants", dataclasses.asdict(variant))
    check_order(variants)


def main() -> None:
    parser = arguments(__doc__, ("quantize", "demo"))
    parser.add_argument("--save", type=Path, help="only quantize, and write the codes")
    parser.add_argument("--preset", choices=PRESETS, default="fast")
    args = parser.parse_args()
    if args.save is not None:
        np.savez(args.save, **quantized(args.preset, args.rehearse))
        return
    require_gpu(args.rehearse)
    record = Record(args.record)
    if args.part == "demo":
        demo(record, args.rehearse)
        return
    rows = []
    for preset in PRESETS[: 1 if args.rehearse else None]:
        rows.append(compared(preset, args.rehearse))
        record.add("presets", rows[-1])
    if not all(row["right"] for row in rows):
        raise SystemExit(f"perplexities differ by more than {PERPLEXITY:.0%} from those of the CPU")


if __name__ == "__main__":
    main()

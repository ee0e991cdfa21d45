"""Where the time of a whole job goes, part by part, next to what its multiplications take at the speed of a large product.

    python benchmarks/bench_parts.py

Two blocks of the model of `bench_quantize.py`, the same tokens, each preset. Every part is waited for, so that nothing overlaps,
and the second of two runs is timed, so that nothing is compiled. Floors count multiplications alone: two for each weight and
token (and for each pair of positions in attention), half of a symmetric sum.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_quantize import MODEL, SAMPLES, SEQ_LEN
from common import circumstances, random_llama, random_tokens, write_result

import jgptq
from converters import load_hf
from jgptq.run import driver, stage

BLOCKS = 2
PARTS = {
    "move and sum": (driver, ("observe", "advance")),
    "factor": (stage, ("prepare_stage",)),
    "solve": (stage, ("solve_stage",)),
}


def wait_for(tree: Any) -> None:
    """Waits for the arrays of a tree that still exist."""
    jax.block_until_ready([leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array) and not leaf.is_deleted()])


@contextmanager
def timed_parts() -> Iterator[dict[str, float]]:
    """Seconds in each part of the runs in this context."""
    seconds = dict.fromkeys(PARTS, 0.0)

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            wait_for((args, kwargs))
            started = time.perf_counter()
            result = function(*args, **kwargs)
            wait_for((result, args))
            seconds[part] += time.perf_counter() - started
            return result

        return wrapped

    before = {(module, name): getattr(module, name) for module, names in PARTS.values() for name in names}
    for part, (module, names) in PARTS.items():
        for name in names:
            setattr(module, name, timed(part, before[module, name]))
    try:
        yield seconds
    finally:
        for (module, name), function in before.items():
            setattr(module, name, function)


def flops(preset: str) -> float:
    """Of moving tokens through the blocks and summing what linears read; of both streams where the float model is followed."""
    d, inner, tokens = MODEL["width"], MODEL["inner"], SAMPLES * SEQ_LEN
    forward = 2 * (4 * d * d + 3 * d * inner) + 2 * SEQ_LEN * d
    hessians = 3 * d * d + inner * inner
    total = forward + hessians
    if preset != "fast":
        # The drift of the inputs of three stages, and of two stages what they give or the stream lost.
        total += forward + 2 * 3 * d * d + 2 * (d * d + inner * d)
    return BLOCKS * tokens * total


def peak() -> float:
    """Multiplications and additions a second of a large float32 product, the best of eight."""
    a = jnp.ones((2048, 2048))
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - started)
    return 2 * 2048**3 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["fast", "balanced"])
    args = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = random_llama(Path(scratch) / "model", **(MODEL | {"blocks": BLOCKS}))
        tokens = np.load(random_tokens(Path(scratch) / "tokens.npy", SAMPLES, SEQ_LEN, MODEL["vocab"]))
        for preset in args.presets:
            jgptq.quantize(load_hf(folder), tokens, preset=preset)
            with timed_parts() as seconds:
                started = time.perf_counter()
                jgptq.quantize(load_hf(folder), tokens, preset=preset)
                total = time.perf_counter() - started
            speed = peak()
            floor = {"flops_to_move_and_sum": flops(preset), "peak_flops_per_second": speed, "floor": flops(preset) / speed}
            results[preset] = {"seconds": seconds | {"total": total}} | floor
            print(preset, json.dumps(results[preset], indent=1), flush=True)
    job = {"model": MODEL | {"blocks": BLOCKS}, "samples": SAMPLES, "seq_len": SEQ_LEN}
    print("wrote", write_result("parts_cpu", {**circumstances(), "job": job, "results": results}))


if __name__ == "__main__":
    main()

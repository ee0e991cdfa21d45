"""One solve: against the published loop in torch, against its own floors, and what it takes to compile.

    python benchmarks/bench_solver.py

A solve is everything between a Hessian and the codes, with their loss: ordering of rows, factorization, loop. That is what the
published loop does, and the ratio that the limit is for. The driver also asks what round-to-nearest would have lost, one more
product with H: both are timed with it too, torch with the undamped loss of its codes as well. 4 bit, symmetric, group 128,
min-max grids, rows in the same order, float32; weights are new in every round. Both use all cores, in one process, in turn;
quoted are the median and every round. Codes and losses are compared as well, so that the speed is that of the same answer.

Measure on a machine that does nothing else. Torch's threads wait for each other by spinning, so that one busy neighbour can make
its loop ten times as slow, and the ratio worthless: the result holds the seconds of all cores, those of the clock, and the load
of the last minute; above 0.5 the script says so.

- `square`, K = N = 4096, and `wide`, K = 14336: at least 3 and 1.8 times as fast as the loop in torch. The parts of our solve
  are compared with their floors: multiplications at the speed of a 4096^3 float32 `jnp.matmul` of the same run, and bytes at that
  of a copy.
- `compile`: tracing and compiling with empty caches, at most 10 s a shape; a second matrix of a shape compiles nothing.
"""

import argparse
import dataclasses
import os
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from common import circumstances, write_result
from solver_rounds import (
    BITS,
    GROUP,
    Compilations,
    Problem,
    jgptq_round,
    plain_config,
    random_hessian,
    random_weights,
    solve_tiles,
    timed,
    torch_round,
    total,
)

from jgptq.run.tiles import tile_columns
from jgptq.settings.run import QuantizeConfig
from jgptq.solver import output_loss, prepare, solve_columns
from jgptq.solver.codes.compensate import solver_block
from pallas_kernels.gptq_block.reference import STEP

LIMITS = {"square": 3.0, "wide": 1.8}
COMPILE_LIMIT = 10.0
COMPILE_SHAPES = {(256, 256): 128, (2080, 2080): 32, (4096, 4096): 128, (14336, 4096): 128}  # (K, N): group size
SECOND_SOLVED = 4096  # the largest K whose second matrix is solved for the count of compilations; `square`, `wide` count theirs
BUSY = 0.5  # load of the last minute from which on a warning is printed


def speeds() -> dict[str, float]:
    """What this machine does at best: multiply-adds a second of a 4096^3 float32 matmul, and bytes a second of a copy."""
    a = jnp.asarray(random_weights(4096, 4096, 0))
    multiply = jax.jit(lambda a: jnp.matmul(a, a, precision=jax.lax.Precision.HIGHEST))
    source = np.ones(1 << 28, np.uint8)
    target = np.zeros_like(source)
    torch_a = torch.from_numpy(random_weights(4096, 4096, 0))
    for run in (lambda: multiply(a), lambda: torch_a @ torch_a):
        run()
    return {
        "multiply_adds": 4096**3 / min(timed(lambda: multiply(a)).seconds for _ in range(5)),
        "copied_bytes": source.nbytes / min(timed(lambda: np.copyto(target, source)).seconds for _ in range(5)),
        "torch_multiply_adds": 4096**3 / min(timed(lambda: torch_a @ torch_a).seconds for _ in range(5)),
    }


def factor_multiply_adds(k: int) -> int:
    """Of a Cholesky factorization; the published loop inverts and factors once more, `2/3 K^3` in all."""
    return k**3 // 6


def floors(k: int, n: int, speed: dict[str, float]) -> dict[str, dict[str, float]]:
    """The least seconds of each part of a solve, from what it multiplies and from what it must move."""
    block = solver_block(k, GROUP)
    inside = k * n * (block + STEP)  # a step of 32 rows multiplies with the whole block, and a row with its step
    parts = {
        "ordering and factorization": {"bytes": 4.0 * k * k, "multiply_adds": float(factor_multiply_adds(k))},
        "loop": {"multiply_adds": float(k * (k - block) // 2 * n + inside)},
        "loss of round-to-nearest": {"multiply_adds": 0.5 * k * k * n},
    }
    for part in parts.values():
        multiplies, moves = part.get("multiply_adds", 0) / speed["multiply_adds"], part.get("bytes", 0) / speed["copied_bytes"]
        part["floor_seconds"] = multiplies + moves
    return parts


def compare(k: int, n: int, rounds: int, speed: dict[str, float]) -> dict[str, Any]:
    """Rounds of ours and of torch in turn, on new weights each, and the parts of our solve against their floors."""
    config, h_kk = plain_config(), random_hessian(k)
    warm = Problem(h_kk, random_weights(k, n, 0))
    jgptq_round(warm, config)
    torch_round(Problem(random_hessian(256), random_weights(256, 256, 0)))
    entries, compiled = [], 0
    for number in range(rounds):
        problem = Problem(h_kk, random_weights(k, n, 1 + number))
        with Compilations() as seen:
            ours = jgptq_round(problem, config)
        compiled += seen.count
        theirs = torch_round(problem)
        loss_of = [_loss(problem, result.pop("values_kn")) for result in (ours, theirs)]
        entries.append(
            {
                "times_as_fast": theirs["seconds"] / ours["seconds"],
                "times_as_fast_both_with_losses": (theirs["seconds"] + theirs["losses"]) / ours["seconds_with_rtn_loss"],
                "equal_codes": float(np.mean(ours.pop("codes_kn") == theirs.pop("codes_kn"))),
                "loss_over_torch": loss_of[0] / loss_of[1],
                "rtn_loss_over_torch": ours["rtn_loss"] / theirs["rtn_loss"],
                "reported_loss_over_recomputed": ours["loss"] / loss_of[0],
                "jgptq": ours,
                "torch": theirs,
            }
        )
        _show_round(k, n, number, entries[-1])
    assert compiled == 0, f"{compiled} compilations in rounds that only changed the weights"
    parts = _parts(warm, config, entries, speed)
    _show_parts(parts)
    searched = [jgptq_round(warm, dataclasses.replace(config, scale="hessian")) for _ in range(2)][1]["seconds"]
    print(f"with scales searched, the default: {searched:.2f} s", flush=True)
    medians = {name: statistics.median(entry[name] for entry in entries) for name in entries[0] if "times" in name}
    return {
        "k": k,
        "n": n,
        "group_size": GROUP,
        "median": medians,
        "parts": parts,
        "compiled_in_rounds": compiled,
        "rounds": entries,
    }


def _loss(problem: Problem, values_kn: np.ndarray) -> float:
    return total(output_loss(jnp.asarray(problem.w_kn - values_kn), jnp.asarray(problem.h_kk)))


def _parts(problem: Problem, config: QuantizeConfig, entries: list[dict[str, Any]], speed: dict[str, float]) -> dict[str, Any]:
    """Seconds of each part, medians."""
    h_kk, w_kn = jnp.asarray(problem.h_kk), jnp.asarray(problem.w_kn)
    lost = jax.jit(output_loss)
    seconds = {
        "ordering and factorization": statistics.median(entry["jgptq"]["prepare"] for entry in entries),
        "loss of round-to-nearest": _median_seconds(lambda: lost(w_kn, h_kk), len(entries)),
        "loop": statistics.median(entry["jgptq"]["solve_columns"] for entry in entries),
    }
    return {name: {**part, "seconds": seconds[name]} for name, part in floors(*w_kn.shape, speed).items()}


def _median_seconds(run: Callable[[], Any], times: int) -> float:
    jax.block_until_ready(run())
    return statistics.median(timed(run).seconds for _ in range(times))


def compile_times(shapes: dict[tuple[int, int], int]) -> list[dict[str, Any]]:
    """Tracing and compiling of both programs for each shape, with empty caches; then two matrices, of which one may compile."""
    entries = []
    for (k, n), group in shapes.items():
        config = plain_config(group)
        columns = tile_columns((n,))
        jax.clear_caches()
        h_kk, w_kn = jax.ShapeDtypeStruct((k, k), jnp.float32), jax.ShapeDtypeStruct((k, columns), jnp.float32)
        first = timed(lambda h=h_kk, c=config: jax.jit(prepare, static_argnums=1).lower(h, c).compile())
        prepared = jax.eval_shape(lambda h, c=config: prepare(h, c), h_kk)
        solve = jax.jit(solve_columns, static_argnums=2)
        second = timed(lambda w=w_kn, p=prepared, c=config, s=solve: s.lower(w, p, c).compile())
        entry = {"k": k, "n": n, "group_size": group, "prepare": first.seconds, "solve_columns": second.seconds}
        entry["seconds"] = first.seconds + second.seconds
        if k <= SECOND_SOLVED:
            entry |= _compilations_of_two(k, n, config)
        print("compile", {name: round(value, 2) for name, value in entry.items()}, flush=True)
        entries.append(entry)
    return entries


def _compilations_of_two(k: int, n: int, config: QuantizeConfig) -> dict[str, int]:
    """Compilations that the first and the second matrix of a shape need, Hessian and weights being new."""
    jax.clear_caches()
    counts = []
    for seed in (1, 2):
        problem = Problem(random_hessian(k) * np.float32(seed), random_weights(k, n, seed))
        with Compilations() as seen:
            h_kk, w_kn = jnp.asarray(problem.h_kk), jnp.asarray(problem.w_kn)
            jax.block_until_ready(solve_tiles(w_kn, prepare(h_kk, config), config))
        counts.append(seen.count)
    assert counts[0] > 0, "compilations are not counted: this version of JAX names the event otherwise"
    assert counts[1] == 0, f"a second matrix compiled {counts[1]} programs"
    return {"compiled_by_first": counts[0], "compiled_by_second": counts[1]}


def _show_round(k: int, n: int, number: int, entry: dict[str, Any]) -> None:
    ours, theirs = entry["jgptq"], entry["torch"]
    print(
        f"K={k} N={n} round {number}: jgptq {ours['seconds']:.2f} s (prepare {ours['prepare']:.2f}), "
        f"torch {theirs['seconds']:.2f} s and losses {theirs['losses']:.2f} s: {entry['times_as_fast']:.2f} times as fast, "
        f"{entry['times_as_fast_both_with_losses']:.2f} with losses in both; "
        f"equal codes {entry['equal_codes']:.4f}, loss {entry['loss_over_torch']:.5f} of torch's",
        flush=True,
    )


def _show_parts(parts: dict[str, Any]) -> None:
    print(f"{'part':28}{'seconds':>10}{'floor':>10}{'of floor':>10}")
    for name, part in parts.items():
        print(f"{name:28}{part['seconds']:10.2f}{part['floor_seconds']:10.2f}{part['seconds'] / part['floor_seconds']:10.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["square", "wide", "compile"], default=["square", "wide", "compile"])
    parser.add_argument("--square", type=int, nargs=2, default=[4096, 4096], metavar=("K", "N"))
    parser.add_argument("--wide", type=int, nargs=2, default=[14336, 4096], metavar=("K", "N"))
    parser.add_argument("--rounds", type=int, default=3, help="of square")
    parser.add_argument("--wide-rounds", type=int, default=2)
    parser.add_argument("--name", default="solver_cpu", help="name of the result")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    if load > BUSY:
        print(f"the load of the last minute is {load:.1f}: ratios measured on a busy machine mean nothing", flush=True)
    speed = speeds()
    print({name: f"{value / 1e9:.1f}e9 a second" for name, value in speed.items()}, flush=True)
    result: dict[str, Any] = {**circumstances(), "torch": torch.__version__, "torch_threads": torch.get_num_threads()}
    result |= {"load_before": load, "bits": BITS, "limits": {**LIMITS, "compile_seconds": COMPILE_LIMIT}, "speeds": speed}
    if "square" in args.only:
        result["square"] = compare(*args.square, args.rounds, speed)
    if "wide" in args.only:
        result["wide"] = compare(*args.wide, args.wide_rounds, speed)
    if "compile" in args.only:
        result["compile"] = compile_times(COMPILE_SHAPES)
    print("wrote", write_result(args.name, result))
    for name in ("square", "wide"):
        if name in result:
            print(f"{name}: {result[name]['median']['times_as_fast']:.2f} times as fast, limit {LIMITS[name]}")
    if "compile" in result:
        print(f"compile: at most {max(entry['seconds'] for entry in result['compile']):.1f} s, limit {COMPILE_LIMIT}")


if __name__ == "__main__":
    main()

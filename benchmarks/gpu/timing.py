"""How long a step takes on a device: the slope between one and several passes of one program.

Wall clock of a single call holds some 100 us of dispatch, more than most kernels take. So a program runs a chain of steps, once
through all its operands and eight times, and the difference counts. Every step reads what the one before it wrote, so that steps
cannot overlap, and operands are more than a cache holds, so that weights come from memory.
"""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PASSES = (1, 8)
COLD_BYTES = 240e6
"""Of operands that a pass goes through: four times the second-level cache of an H200."""

Step = Callable[[jax.Array, Any], jax.Array]
"""From what is carried and one operand to what is carried next."""


class Slope(NamedTuple):
    """Seconds of one step."""

    seconds: float  # from the quickest run of each number of passes
    median: float  # from the medians
    wall: float  # the quickest run of one pass, dispatch included, by its steps


def chained(product: Callable[[jax.Array, Any], jax.Array]) -> Step:
    """The step `x -> x`, that multiplies x and carries a trace of the whole result on: without it products could overlap."""

    def step(x: jax.Array, operand: Any) -> jax.Array:
        # The barrier keeps XLA from computing only the column that is read.
        y = jax.lax.optimization_barrier(product(x, operand))
        return jax.lax.optimization_barrier(x + y[:, :1] * jnp.asarray(1e-30, y.dtype).astype(x.dtype))

    return step


def slopes(steps: dict[str, tuple[Step, jax.Array, Sequence[Any]]], repeats: int) -> dict[str, Slope]:
    """Times several steps in turns.

    Args:
      steps: by name, the step, what is carried first, and the operands of one pass.
      repeats: runs of each.

    Returns:
      The slope of each.
    """
    runs: dict[tuple[str, int], Callable[[], Any]] = {}
    for name, (step, carry, operands) in steps.items():
        for passes in PASSES:
            program = jax.jit(functools.partial(_passes, step, passes))
            runs[name, passes] = functools.partial(program, carry, list(operands))
    times = seconds(runs, repeats)
    slope_of = {}
    for name, (_, _, operands) in steps.items():
        short, long = (times[name, passes] for passes in PASSES)
        count = len(operands) * (PASSES[1] - PASSES[0])
        median = (statistics.median(long) - statistics.median(short)) / count
        slope_of[name] = Slope((min(long) - min(short)) / count, median, min(short) / len(operands))
    return slope_of


def _passes(step: Step, passes: int, carry: jax.Array, operands: list[Any]) -> jax.Array:
    def run(_: jax.Array, carry: jax.Array) -> jax.Array:
        for operand in operands:
            carry = step(carry, operand)
        return carry

    return jax.lax.fori_loop(0, passes, run, carry)


def seconds(runs: dict[Any, Callable[[], Any]], repeats: int) -> dict[Any, list[float]]:
    """Wall clock of calls that take turns, each warmed up once."""
    for run in runs.values():
        jax.block_until_ready(run())
    times: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - started)
    return times


def device_times(run: Callable[[], Any], most: int = 4) -> dict[str, float]:
    """Microseconds a launch of the kernels that take longest, by the profiler; none where there is no GPU."""
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        files = list(Path(folder).rglob("*.xplane.pb"))
        planes = jax.profiler.ProfileData.from_file(str(files[0])).planes if files else []
        durations: dict[str, list[float]] = {}
        for plane in planes:
            for line in plane.lines if plane.name.startswith("/device:GPU") else ():
                for event in line.events if line.name.startswith("Stream") else ():
                    durations.setdefault(event.name, []).append(event.duration_ns / 1e3)
    longest = sorted(durations, key=lambda name: -sum(durations[name]))[:most]
    return {name: statistics.median(durations[name]) for name in longest}

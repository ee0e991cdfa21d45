"""Experts solved at once: the programs of one linear, mapped over a stack of problems."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jgptq.errors import NumericalError
from jgptq.models.packed import PackedTensor, pack
from jgptq.notation import Array, Float
from jgptq.run.report import LinearReport
from jgptq.settings.solver import SolverConfig
from jgptq.solver import Outcome, judge_columns, prepare, round_to_nearest
from jgptq.solver.statistics.experts import ExpertSums, mean_experts

_CHUNK_BYTES = 1 << 30
"""What the sums of the experts that are solved at once may take, with the factors made of them."""
_SQUARES = 5  # matrices over K that a solve holds: Hessian, drift, factor and copies
_KERNELS = 6  # and over K x N
_CPU_EXPERTS = 4  # that a CPU works on at once


class Chunk(NamedTuple):
    """Some experts of a stage."""

    kernels: Sequence[Float[jax.Array, "E K N"]]  # of each linear
    total: ExpertSums | None  # None without calibration tokens
    tokens_e: np.ndarray  # int64, tokens routed to each expert
    starved_e: np.ndarray  # bool, experts that got too few
    names: Sequence[Sequence[str]]  # of each expert: what reports call its linears


class ExpertRow(NamedTuple):
    """What a report says of one expert, for all its linears."""

    names: Sequence[str]
    shapes: Sequence[tuple[int, int]]
    loss: Sequence[float | None]
    rtn_loss: Sequence[float | None]
    fields: dict[str, Any]
    seconds: float = 0.0

    def report(self, index: int) -> LinearReport:
        """The row of one of its linears."""
        (k, n), width = self.shapes[index], sum(n for _, n in self.shapes)
        loss, rtn_loss, fields = self.loss[index], self.rtn_loss[index], dict(self.fields)
        if loss is not None and rtn_loss is not None and loss > rtn_loss:
            fields["note"] = f"{fields['note']} The loss is above that of round-to-nearest.".strip()
        seconds = self.seconds * n / width
        return LinearReport(name=self.names[index], k=k, n=n, loss=loss, rtn_loss=rtn_loss, seconds=seconds, **fields)


class SolvedChunk(NamedTuple):
    """The experts of a chunk, solved."""

    packed: list[PackedTensor]  # of each linear, with a leading axis E, in host memory
    kernels: list[Float[jax.Array, "E K N"]]  # what the model computes with from here on
    rows: list[ExpertRow]


class _Solved(NamedTuple):
    """The columns of all linears side by side, of every expert."""

    packed: PackedTensor
    kernel: jax.Array | None
    loss: jax.Array
    rtn_loss: jax.Array
    damping: jax.Array
    outcome: jax.Array


def experts_at_once(experts: int, k: int, n: int) -> int:
    """How many experts are solved at once: a divisor of E, so that one program serves all chunks.

    Args:
      experts: E.
      k: in-features.
      n: out-features of all linears together.
    """
    each = 4 * k * (_SQUARES * k + _KERNELS * n)
    most = max(1, _CHUNK_BYTES // each)
    return max(size for size in range(1, min(experts, most) + 1) if experts % size == 0)


def solve_chunk(chunk: Chunk, config: SolverConfig, dtype: jnp.dtype, *, allow_rtn: bool) -> SolvedChunk:
    """Quantizes the linears of some experts, each on its own Hessian, which those that read the same activations share.

    Args:
      chunk: the experts; sums of starved ones are as `config.starved_experts` says already.
      config: the solver's settings.
      dtype: of the expanded kernels.
      allow_rtn: whether an expert that cannot be solved is rounded to nearest.

    Raises:
      NumericalError: experts that cannot be solved, all of them.
    """
    w_ekn = _wide(tuple(chunk.kernels))
    solved = _run(w_ekn, chunk.total, config, dtype)
    outcome_e = np.asarray(solved.outcome)
    failed_e = outcome_e >= Outcome.ZERO_HESSIAN
    rounded_e = failed_e.copy() if allow_rtn else np.zeros_like(failed_e)
    if config.starved_experts == "rtn":
        rounded_e |= chunk.starved_e
    beyond_e = np.isin(outcome_e, [Outcome.ZERO_HESSIAN, Outcome.NOT_FACTORED], invert=True)
    _check(chunk, outcome_e, failed_e & (beyond_e | ~rounded_e))
    if rounded_e.any():
        nearest = _run(w_ekn, chunk.total, dataclasses.replace(config, method="rtn"), dtype)
        solved = _chosen(jnp.asarray(rounded_e), _like(nearest, solved), solved)
    solved_ekn, host = solved.kernel, jax.device_get(solved._replace(kernel=None))
    assert solved_ekn is not None
    widths = [kernel.shape[2] for kernel in chunk.kernels]
    ends = np.cumsum(widths)
    bounds = list(zip(ends - widths, ends, strict=True))
    return SolvedChunk(
        packed=[_columns(host.packed, start, stop, int(ends[-1])) for start, stop in bounds],
        kernels=[solved_ekn[:, :, start:stop] for start, stop in bounds],
        rows=[_row(chunk, host, outcome_e, index, bounds, config) for index in range(len(outcome_e))],
    )


def joined(parts: Sequence[PackedTensor]) -> PackedTensor:
    """The stacks of several chunks as one."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


@jax.jit
def _wide(kernels: tuple[jax.Array, ...]) -> jax.Array:
    return jnp.concatenate(kernels, axis=2).astype(jnp.float32)


def _run(w_ekn: jax.Array, total: ExpertSums | None, config: SolverConfig, dtype: jnp.dtype) -> _Solved:
    config = config.solver.dense
    if not config.float64:
        return _solve(w_ekn, total, config, dtype)
    with jax.enable_x64(True):
        return _solve(w_ekn, total, config, dtype)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _solve(w_ekn: jax.Array, total: ExpertSums | None, config: SolverConfig, dtype: jnp.dtype) -> _Solved:
    """One program for all experts."""

    def one(w_kn: jax.Array, h_kk: jax.Array | None, drift_kk: jax.Array | None) -> _Solved:
        if h_kk is None:
            solution = round_to_nearest(w_kn, config)
        else:
            solution = judge_columns(w_kn, prepare(h_kk, config, drift_kk), config)
        zero_gn = None if config.sym else solution.zero_gn
        sizes = {"bits": config.bits, "group_size": config.group_size}
        packed = pack(solution.codes_kn, solution.scale_gn, zero_gn, solution.group_k, **sizes)
        rtn_loss_n = solution.loss_n if solution.rtn_loss_n is None else solution.rtn_loss_n
        kernel = solution.dequantize().astype(dtype)
        return _Solved(packed, kernel, solution.loss_n, rtn_loss_n, solution.damping, solution.outcome)

    problems = (w_ekn, *((None, None) if total is None else mean_experts(total)))
    if jax.default_backend() != "cpu":
        return jax.vmap(one)(*problems)
    # On a CPU all experts at once do not fit its cache, and one at a time leaves its vector units idle.
    few = max(size for size in range(1, _CPU_EXPERTS + 1) if w_ekn.shape[0] % size == 0)
    return jax.lax.map(lambda problem: one(*problem), problems, batch_size=few)


@jax.jit
def _chosen(first_e: jax.Array, first: _Solved, second: _Solved) -> _Solved:
    """Of each expert one of two solutions."""
    return jax.tree.map(lambda a, b: jnp.where(first_e.reshape((-1,) + (1,) * (a.ndim - 1)), a, b), first, second)


def _like(nearest: _Solved, solved: _Solved) -> _Solved:
    """Rounded experts with an index of groups, where the solved ones have one."""
    index_ek = solved.packed.group_index
    if index_ek is None:
        return nearest
    k, groups = index_ek.shape[1], nearest.packed.scales.shape[1]
    contiguous = jnp.broadcast_to(jnp.arange(k, dtype=index_ek.dtype) // (k // groups), index_ek.shape)
    return nearest._replace(packed=dataclasses.replace(nearest.packed, group_index=contiguous))


def _check(chunk: Chunk, outcome_e: np.ndarray, wrong_e: np.ndarray) -> None:
    """Raises an error that names every expert without a usable solution."""
    if not wrong_e.any():
        return
    wrong = [int(index) for index in np.flatnonzero(wrong_e)]
    lines = [f"{', '.join(chunk.names[index])}: {Outcome(int(outcome_e[index])).message}" for index in wrong]
    rescuable = np.isin(outcome_e[wrong_e], [Outcome.ZERO_HESSIAN, Outcome.NOT_FACTORED]).all()
    hint = " To round such linears to nearest instead, pass allow_rtn_fallback=True (--allow-rtn-fallback)." if rescuable else ""
    raise NumericalError("\n".join(lines) + hint)


def _columns(packed: PackedTensor, start: int, stop: int, width: int) -> PackedTensor:
    """Some columns of every expert: zero points are packed along them."""

    def cut(leaf: Array) -> Array:
        return leaf[..., start * leaf.shape[-1] // width : stop * leaf.shape[-1] // width]

    return dataclasses.replace(
        packed,
        qweight=cut(packed.qweight),
        scales=cut(packed.scales),
        zeros=None if packed.zeros is None else cut(packed.zeros),
        shape=(packed.shape[0], int(stop - start)),
    )


def _row(
    chunk: Chunk, host: Any, outcome_e: np.ndarray, index: int, bounds: Sequence[tuple[int, int]], config: SolverConfig
) -> ExpertRow:
    measured = chunk.total is not None
    fields: dict[str, Any] = {
        "outcome": Outcome(int(host.outcome[index])).name,
        "bits": config.bits,
        "note": _note(chunk, int(outcome_e[index]), index, config),
        "tokens": int(chunk.tokens_e[index]),
    }
    if measured:
        fields["damping"] = float(host.damping[index])

    def sums(loss_en: np.ndarray) -> list[float | None]:
        return [float(loss_en[index, start:stop].astype(np.float64).sum()) if measured else None for start, stop in bounds]

    shapes = [(host.packed.shape[0], int(stop - start)) for start, stop in bounds]
    return ExpertRow(chunk.names[index], shapes, sums(host.loss), sums(host.rtn_loss), fields)


_STARVED = {
    "shrink": "its Hessian was mixed with the mean of its layer",
    "all_tokens": "it was solved on all tokens",
    "rtn": "it was rounded to nearest",
}


def _note(chunk: Chunk, outcome: int, index: int, config: SolverConfig) -> str:
    """The diagnosis in words."""
    said = "" if outcome in (Outcome.SOLVED, Outcome.ROUNDED) else Outcome(outcome).message
    if not chunk.starved_e[index]:
        return said
    count = f"{chunk.tokens_e[index]} tokens were routed to this expert"
    return f"{count}: {_STARVED[config.starved_experts]} (starved_experts). {said}".strip()

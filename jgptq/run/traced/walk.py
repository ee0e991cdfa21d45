"""Goes through a cut program: moves batches through segments, solves linears in between, repeats the bodies of loops."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from jgptq.models.memory import to_device
from jgptq.models.packed import PackedTensor
from jgptq.run.progress import Progress
from jgptq.run.report import LinearReport
from jgptq.run.stage import Job, solve_kernels
from jgptq.run.traced.plan import by_settings
from jgptq.settings.solver import SolverConfig
from jgptq.solver.methods import method_of
from jgptq.solver.statistics.drift import StageSums
from jgptq.trace.evaluate import Runner, Streams, both
from jgptq.trace.loops import after_loop, cast, first_carries, handed_on, layer_outputs, layer_values, layer_weights
from jgptq.trace.program import Values, only
from jgptq.trace.segments import Cut, Group, LayerLoop, Segment, read_later


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where in the loops over layers a program runs, and the dtypes that its weights are cast to on the way there."""

    layers: tuple[int, ...]
    dtypes: Mapping[int, tuple[Any, ...]]  # input of the program -> from the dtype of the tree on


class Walk:
    """A run over a traced model.

    Args:
      names: of the arrays of the tree.
      settings: of the linears, by the array that is their weight.
      job: what holds for every solve.
      bar: counts solved groups.
    """

    def __init__(self, names: Sequence[str], settings: Mapping[int, SolverConfig], job: Job, bar: Progress):
        self.packed: dict[int, dict[tuple[int, ...], PackedTensor]] = {leaf: {} for leaf in settings}
        self.rows: list[LinearReport] = []
        self._names = names
        self._settings = settings
        self._job = job
        self._bar = bar
        self._runner = Runner()

    def run(self, cut: Cut, fixed: Streams, batches: list[Streams], place: Place) -> None:
        """Goes through a program once, for all batches, in place.

        Args:
          cut: the program.
          fixed: weights and constants.
          batches: the values of each batch as the program begins.
          place: where it runs.
        """
        total: StageSums | None = None
        for action, needed in zip(cut.actions, read_later(cut), strict=True):
            if isinstance(action, Segment):
                total = self._runner.run(action, fixed, batches, drift=self._drift(action.observes))
            elif isinstance(action, Group):
                fixed = Streams(fixed.quantized | self._solved(action, fixed.quantized, total, place), fixed.float_)
            else:
                self._loop(action, fixed, batches, place)
            # A weight on the grid is not kept until the end of the run: the result holds its codes.
            fixed = both(partial(only, needed), fixed)

    def _drift(self, group: Group | None) -> bool:
        """Whether a solve of the group reads the float model."""
        return group is not None and any(method_of(used).statistics.float_model for used in by_settings(group, self._settings))

    def _solved(self, group: Group, weights: Values, total: StageSums | None, place: Place) -> dict[int, Any]:
        """Solves the linears of a group; returns their weights on the grid."""
        replaced: dict[int, Any] = {}
        for used, linears in by_settings(group, self._settings).items():
            names = [self._names[linear.leaf] + "".join(f"[{layer}]" for layer in place.layers) for linear in linears]
            self._bar.describe(" ".join(names))
            kernels = [linear.w_kn.forward(to_device(weights[linear.weight])) for linear in linears]
            solved, rows = solve_kernels(names, kernels, total, used, self._job)
            self.rows += rows
            for linear, result, kernel in zip(linears, solved.linears, solved.kernels, strict=True):
                self.packed[linear.leaf][place.layers] = result.packed
                replaced[linear.weight] = cast(linear.w_kn.backward(kernel), place.dtypes[linear.weight])
        self._bar.advance()
        return replaced

    def _loop(self, action: LayerLoop, fixed: Streams, batches: list[Streams], place: Place) -> None:
        """Goes through the body of a loop layer by layer, so that of each batch one layer's values are there at a time."""
        loop = action.loop
        known = self._runner.fixed_values(action.fixed, fixed)
        dtypes = {inner: place.dtypes[view.root] + view.dtypes for inner, view in loop.stacks.items()}
        carried = [both(partial(first_carries, loop), batch, known) for batch in batches]
        layers: dict[int, list[Streams]] = {}
        for layer in loop.order:
            weights = both(partial(layer_weights, loop, layer), fixed, known)
            inner = [both(partial(layer_values, loop, layer), *pair) for pair in zip(batches, carried, strict=True)]
            self.run(action.body, weights, inner, Place(layers=(*place.layers, layer), dtypes=dtypes))
            made = self._runner.fixed_values(action.outputs, weights)
            carried = [both(partial(handed_on, loop), batch, made, weights) for batch in inner]
            layers[layer] = [both(partial(layer_outputs, action), batch, made, weights) for batch in inner]
        for index, batch in enumerate(batches):
            stack = both(lambda *outputs: list(outputs), *(layers[layer][index] for layer in range(loop.length)))
            batches[index] = both(partial(after_loop, action), batch, carried[index], stack)

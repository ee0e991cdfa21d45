"""Cuts a program where linears are solved: segments of equations, and between them groups of linears and loops over layers."""

import dataclasses
from collections.abc import Collection, Iterable, Sequence

from jgptq.trace.linears import Contents, Linear, Loop
from jgptq.trace.program import Equation, Program
from jgptq.trace.residual import Residual, residual_of


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Linears that read the same value, so that they share a Hessian; they are solved before the first of them runs."""

    linears: tuple[Linear, ...]
    residual: Residual | None  # what the output is added to; only looked for where the linear is alone

    @property
    def position(self) -> int:
        """Of the first of them."""
        return self.linears[0].position

    @property
    def reads(self) -> frozenset[int]:
        """The values that are summed over."""
        return frozenset({self.linears[0].reads} | ({self.residual.value} if self.residual else set()))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """Equations that run as one compiled function, for all batches one after the other."""

    equations: tuple[Equation, ...]  # with those of fixed values that are needed here, which are never kept
    fixed: tuple[int, ...]  # the weights and constants that are read
    takes: tuple[int, ...]  # the batch's values that are read
    gives: tuple[int, ...]  # the values that are needed later
    keeps: frozenset[int]  # every value of a batch that is needed later
    observes: Group | None  # linears over whose inputs is summed at the end


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LayerLoop:
    """A loop over layers, whose body is cut as well."""

    loop: Loop
    body: "Cut"
    fixed: Segment  # gives those inputs that do not depend on the batch, leaves of the tree excepted
    outputs: Segment  # gives those outputs of the body that do not depend on the batch
    keeps: frozenset[int]  # every value of a batch that is needed after it


Action = Segment | Group | LayerLoop


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """A program as actions, one after the other."""

    program: Program
    actions: tuple[Action, ...]


def cut(program: Program, contents: Contents, chosen: Collection[int], returns: Collection[int] = ()) -> Cut:
    """Cuts a program.

    Args:
      program: the program.
      contents: what it holds.
      chosen: the leaves that are quantized; the products of others are equations like any other.
      returns: the values at its end that are needed.
    """
    groups = {group.position: group for group in _groups(program, contents, chosen)}
    loops = {position: loop for position, loop in contents.loops.items() if _holds(loop, chosen)}
    needed = frozenset(returns)
    actions: list[Action] = []
    end = len(program.equations)
    observes: Group | None = None
    for position in sorted(groups.keys() | loops.keys(), reverse=True):
        start = position + 1 if position in loops else position
        segment = _segment(program, program.equations[start:end], needed, observes)
        needed, observes, end = _needed_before(segment), groups.get(position), position
        actions.append(segment)
        if observes is not None:
            actions.append(observes)
        else:
            action = _layer_loop(program, loops[position], chosen, needed)
            actions.append(action)
            read = {value for value in action.loop.equation.reads if not program.is_fixed(value)}
            needed = frozenset((needed - set(action.loop.equation.outputs)) | read)
    actions.append(_segment(program, program.equations[:end], needed, observes))
    return Cut(program, tuple(reversed(actions)))


def read_later(cut: Cut) -> list[frozenset[int]]:
    """Of each action, the weights and constants that actions after it read."""
    later: frozenset[int] = frozenset()
    sets = []
    for action in reversed(cut.actions):
        sets.append(later)
        if isinstance(action, Segment):
            later |= frozenset(action.fixed)
        elif isinstance(action, Group):
            later |= {linear.weight for linear in action.linears}
        else:
            later |= frozenset(action.fixed.fixed) | {view.root for view in action.loop.stacks.values()}
    return sets[::-1]


def _holds(loop: Loop, chosen: Collection[int]) -> bool:
    """Whether a loop, or one inside of it, holds a linear that is quantized."""
    inner = (_holds(other, chosen) for other in loop.contents.loops.values())
    return any(linear.leaf in chosen for linear in loop.contents.linears) or any(inner)


def _groups(program: Program, contents: Contents, chosen: Collection[int]) -> Iterable[Group]:
    """The linears that are quantized, those together that read the same."""
    shared: dict[object, list[Linear]] = {}
    for linear in contents.linears:
        if linear.leaf in chosen:
            shared.setdefault(linear.source, []).append(linear)
    for linears in shared.values():
        residual = residual_of(program, contents, linears[0]) if len(linears) == 1 else None
        yield Group(linears=tuple(linears), residual=residual)


def _needed_before(segment: Segment) -> frozenset[int]:
    """The batch's values that have to be there when a segment begins."""
    made = {value for equation in segment.equations for value in equation.outputs}
    return frozenset((segment.keeps - made) | set(segment.takes))


def _segment(program: Program, equations: Sequence[Equation], keeps: frozenset[int], observes: Group | None) -> Segment:
    """The segment of those equations of a run of them that somebody needs."""
    observed = frozenset() if observes is None else observes.reads
    made = {value: equation for equation in equations for value in equation.outputs}
    varying = [equation for equation in _upstream(made, keeps | observed) if not _is_fixed(program, equation)]
    makers = _fixed_makers(program)
    read = _reads(varying) | observed
    fixed = _upstream(makers, (value for value in read if program.is_fixed(value)))
    outputs = {value for equation in varying for value in equation.outputs}
    roots = {value for value in read | _reads(fixed) if program.is_fixed(value) and value not in makers}
    return Segment(
        equations=(*fixed, *varying),
        fixed=tuple(sorted(roots)),
        takes=tuple(sorted(value for value in read - outputs if not program.is_fixed(value))),
        gives=tuple(sorted(keeps & outputs)),
        keeps=keeps,
        observes=observes,
    )


def _layer_loop(program: Program, loop: Loop, chosen: Collection[int], keeps: frozenset[int]) -> LayerLoop:
    """A loop, its body cut."""
    pairs = zip(loop.equation.outputs, loop.body.outputs, strict=True)
    returned = {inner for outer, inner in pairs if isinstance(inner, int) and (outer in keeps or outer in loop.carried)}
    outputs = frozenset(value for value in returned if loop.body.is_fixed(value))
    body = cut(loop.body, loop.contents, chosen, returned - outputs)
    stacked = {value for value, inner in zip(loop.equation.inputs, loop.body.inputs, strict=True) if inner in loop.stacks}
    inputs = frozenset(value for value in loop.equation.reads if program.is_fixed(value) and value not in stacked)
    return LayerLoop(
        loop=loop,
        body=body,
        fixed=_fixed_values(program, inputs),
        outputs=_fixed_values(loop.body, outputs),
        keeps=keeps,
    )


def _fixed_values(program: Program, wanted: frozenset[int]) -> Segment:
    """The segment that computes values which do not depend on the batch."""
    makers = _fixed_makers(program)
    equations = _upstream(makers, wanted)
    roots = {value for value in wanted | _reads(equations) if value not in makers}
    return Segment(
        equations=tuple(equations), fixed=tuple(sorted(roots)), takes=(), gives=tuple(sorted(wanted)), keeps=wanted, observes=None
    )


def _upstream(made: dict[int, Equation], wanted: Iterable[int]) -> list[Equation]:
    """The equations that values depend on, in the order in which they run."""
    used: set[int] = set()
    waiting = list(wanted)
    order = {id(equation): number for number, equation in enumerate(dict.fromkeys(made.values()))}
    found: dict[int, Equation] = {}
    while waiting:
        value = waiting.pop()
        if value in used or value not in made:
            continue
        used.add(value)
        found[order[id(made[value])]] = made[value]
        waiting += made[value].reads
    return [found[number] for number in sorted(found)]


def _fixed_makers(program: Program) -> dict[int, Equation]:
    """The equations that make values which do not depend on the batch."""
    return {value: equation for equation in program.equations if _is_fixed(program, equation) for value in equation.outputs}


def _is_fixed(program: Program, equation: Equation) -> bool:
    """Whether an equation depends on weights and constants alone."""
    return all(program.is_fixed(value) for value in equation.outputs)


def _reads(equations: Iterable[Equation]) -> set[int]:
    return {value for equation in equations for value in equation.reads}

"""Programs compiled before they are needed, on threads, while the first batches are on their way.

Most of what a run of a small model takes is compilation, one program after the other, on one core. What will be compiled follows
from shapes that are known before anything is computed. JAX compiles a program once: where the run needs one that a thread is
compiling, it waits for that one. What a caller sets for its own thread alone, such as `jax.default_matmul_precision` as a
context, is not seen here: the run then compiles its own programs when it needs them.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Literal, NamedTuple

import jax

from jgptq.models import Unit
from jgptq.models.memory import abstract, copy_module
from jgptq.run.batches import Batch, Observation, advance_program, empty_sums
from jgptq.run.plan import StagePlan
from jgptq.run.stage import Job
from jgptq.run.tiles import stage_programs

Step = Literal["solve", "move"]
"""What a run does with a stage: solves its linears, or moves batches through it."""

_THREADS = 1


class Program(NamedTuple):
    """A program of a unit."""

    step: Step
    stages: tuple[int, ...]  # the stages that need it
    build: Callable[[], object]  # traces and compiles it


class Ahead:
    """Programs on their way.

    Args:
      programs: what threads compile, in this order.
    """

    def __init__(self, programs: Iterable[Program]):
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="compile")
        self._begun = [(program, self._threads.submit(program.build)) for program in programs]

    def settle(self, step: Step, stage: int) -> None:
        """Waits for what a thread compiles of this step of a stage, and takes what none has begun out of the queue: two threads
        that trace the same program at once would both be slow."""
        for program, future in self._begun:
            if program.step == step and stage in program.stages and not future.cancel():
                wait([future])

    def close(self) -> None:
        """Waits for what is being compiled, and drops the rest."""
        self._threads.shutdown(wait=True, cancel_futures=True)


def compiled_ahead(programs: Iterable[Program]) -> contextlib.closing[Ahead]:
    """Compiles programs in their order on threads while the context is open; those not begun at its end are dropped.

    What fails on a thread fails again where the run needs the program, and is raised there.
    """
    return contextlib.closing(Ahead(programs))


def unit_programs(
    unit: Unit, plan: Sequence[StagePlan], wanted: Sequence[Observation | None], batch: Batch, job: Job
) -> list[Program]:
    """What solving a unit and moving a batch through it compiles: solves first, and last the move through its last stage.

    Args:
      unit: a block or the head.
      plan: what happens to its stages.
      wanted: what is summed of the inputs of each stage; None for nothing.
      batch: one as it enters the unit.
      job: what holds for every stage of the run.
    """
    work, batch = abstract(unit), abstract(batch)
    solves: dict[object, tuple[list[int], list[Callable[[], object]]]] = {}
    moves: list[Program] = []
    for number, (decision, observed) in enumerate(zip(plan, wanted, strict=True)):
        if observed is not None:
            shapes = tuple(work.linears()[path].kernel.get_value().shape for path in decision.names)
            total = jax.eval_shape(lambda number=number, observed=observed: empty_sums(work, number, observed))
            columns = job.columns[shapes[0][0], decision.config]
            programs = stage_programs(
                total,
                decision.config,
                columns=columns,
                dtype=job.dtype,
                placement=job.placement,
                pulled=observed.pull is not None,
            )
            key = (shapes[0][0], columns, decision.config, decision.pulls)
            solves.setdefault(key, ([], programs))[0].append(number)
        if decision.kept_float is None:
            for path in decision.names:
                kernel = work.linears()[path].kernel
                kernel.set_value(jax.ShapeDtypeStruct(kernel.get_value().shape, job.dtype))
        following = wanted[number + 1] if number + 1 < len(plan) else None
        # Where nothing follows the float model, the unit that is quantized stands in for the float one.
        reference = work if batch.reference is None else abstract(unit)
        program, batch = advance_program(
            copy_module(work),
            copy_module(reference),
            batch,
            number,
            following,
            pulled=observed is not None and observed.pull is not None,
        )
        moves.append(Program("move", (number,), program))
    return [Program("solve", tuple(stages), build) for stages, builds in solves.values() for build in builds] + moves

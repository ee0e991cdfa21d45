"""Tuning: gradient descent on what files hold in floating point, for codes that are fixed.

After the last block, scales and norms are all that is left to move without another byte in the file or another operation when it
is served. They are trained to minimize, over the calibration tokens, the mean Kullback-Leibler divergence of the quantized
model's next-token distribution from the float model's. Training scales end to end is the second phase of
EfficientQAT (arXiv 2407.11062); here the float model's last residual stream, which the shift of targets carries along too, is
the teacher.

Backpropagation goes block by block: only the residual streams between blocks are kept, and one program serves all blocks of a
shape, forwards, and one backwards.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jgptq.models import Block, Decoder, ExpertLinear, Linear, Norm
from jgptq.models.memory import copy_module, to_device
from jgptq.models.mixture.leaves import PackedExperts
from jgptq.models.packed import PackedTensor
from jgptq.notation import Array, Float, Int
from jgptq.run.report import TuningReport

LEARNING_RATE = 1e-2
LENGTHS = (1.0, 0.5, 0.25)
"""Fractions of the way that Adam went: the one with the least divergence on what was held out is taken."""
HELD_OUT = 16
STEP_TOKENS = 4096
"""Tokens in a step at most, unless one batch is larger."""
STEPS = 24
"""Steps at least, unless there are fewer batches: then they are smaller."""

Factors = dict[str, jax.Array]
"""Factors of scales `[G, N]` and of norms `[D]`, by their path; all begin as ones."""


Trained = tuple[list[Factors], Factors]
"""Factors of the blocks, and of the last norm."""


class Lesson(NamedTuple):
    """A calibration batch, and where the float model takes it."""

    tokens: Int[np.ndarray, "b S"]
    residual: Float[jax.Array, "b S D"]  # the float residual stream after the last block


def tune(params: Decoder, original: Decoder, lessons: Sequence[Lesson], passes: float) -> tuple[Decoder, TuningReport]:
    """Moves scales and norms towards the float model's predictions, with Adam (arXiv 1412.6980) on factors of them.

    Every sixteenth lesson is held out. Of the whole way, half and a quarter of it the point is taken whose divergence on those
    is least, so that a rate that is too high for one model costs little; where none is below that of the start, the model is
    returned unchanged.

    Args:
      params: the quantized decoder.
      original: the float decoder; its head is the teacher's.
      lessons: the calibration batches, all of one shape.
      passes: over the lessons, so that the cost is in proportion to that of the calibration; in steps of up to 4096 tokens. The
        learning rate falls to zero along a cosine.

    Returns:
      The decoder, whose codes and other leaves are those of `params`, and what happened.
    """
    model, teacher = to_device(params), to_device(original.without_blocks())
    held_out, lessons = _split(lessons)
    blocks = [_factors_of(block.norms(), block.linears()) for block in model.layers]
    norm = _factors_of(model.norms(), {})
    before = _divergence(model, teacher, blocks, norm, held_out)
    schedule = _schedule(lessons, max(1, round(passes * (len(lessons) + len(held_out)))))
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, len(schedule)), b2=0.99)
    trained = (blocks, norm)
    state = optimizer.init(trained)
    for chosen in schedule:
        gradient = _gradient(model, teacher, *trained, chosen)
        trained, state = _update(trained, state, gradient, optimizer)
    ends = [_part_of_the_way(trained, length) for length in LENGTHS]
    after, best = min((_divergence(model, teacher, end[0], end[1], held_out), number) for number, end in enumerate(ends))
    kept = bool(after < before)
    report = TuningReport(steps=len(schedule), before=before, after=after, kept=kept)
    return (_applied(params, *ends[best]) if kept else params), report


@jax.jit
def _part_of_the_way(trained: Trained, length: float) -> Trained:
    """Factors between one, where all began, and where they were moved to."""
    return jax.tree.map(lambda factor: 1.0 + jnp.asarray(length, factor.dtype) * (factor - 1.0), trained)


def _split(lessons: Sequence[Lesson]) -> tuple[list[Lesson], list[Lesson]]:
    """Those that are held out, and those to learn from; a single lesson has to be both."""
    learnt = [lesson for number, lesson in enumerate(lessons) if number % HELD_OUT]
    return list(lessons[::HELD_OUT]), learnt or list(lessons)


def _schedule(lessons: Sequence[Lesson], wanted: int) -> list[list[Lesson]]:
    """The lessons of each step, about as many in all as are wanted: each in a shuffled order before any comes again."""
    size = max(1, min(wanted // STEPS, STEP_TOKENS // lessons[0].tokens.size))
    random = np.random.default_rng(0)
    needed = wanted // size * size
    order = np.concatenate([random.permutation(len(lessons)) for _ in range(-(-needed // len(lessons)))])[:needed]
    return [[lessons[index] for index in order[start : start + size]] for start in range(0, needed, size)]


def _factors_of(norms: Mapping[str, Norm], linears: Mapping[str, Linear | ExpertLinear]) -> Factors:
    """Ones, for every scale of norms and of packed linears."""
    factors = {path: jnp.ones_like(norm.scale.get_value(), jnp.float32) for path, norm in norms.items() if norm.scale is not None}
    for path, linear in linears.items():
        kernel = linear.kernel.get_value()
        if isinstance(kernel, PackedTensor | PackedExperts):
            factors[path] = jnp.ones(kernel.scales.shape, jnp.float32)
    return factors


def _multiply(
    norms: Mapping[str, Norm],
    linears: Mapping[str, Linear | ExpertLinear],
    factors: Factors,
    times: Callable[[Array, jax.Array, float], Any],
) -> None:
    """Multiplies scales in place by `times(scale, factor, offset)`: what acts is the offset plus the stored scale."""
    for path, norm in norms.items():
        if norm.scale is not None:
            norm.scale.set_value(times(norm.scale.get_value(), factors[path], norm.offset))
    for path, linear in linears.items():
        kernel = linear.kernel.get_value()
        if isinstance(kernel, PackedTensor | PackedExperts):
            linear.kernel = nnx.Param(kernel.with_scales(times(kernel.scales, factors[path], 0.0)))


def _traced(leaf: Array, factor: jax.Array, offset: float) -> jax.Array:
    """The product in float32."""
    scale = jnp.asarray(leaf).astype(jnp.float32)
    return (scale + offset) * factor - offset if offset else scale * factor


def _rounded(leaf: Array, factor: jax.Array, offset: float) -> np.ndarray:
    """The product in float32, rounded to the dtype that the leaf has; in host memory."""
    scale, by = np.asarray(leaf, np.float32), np.asarray(factor)
    return ((scale + offset) * by - offset if offset else scale * by).astype(leaf.dtype)


def _with_factors(block: Block, factors: Factors) -> Block:
    """The block with its scales and norms multiplied, in float32."""
    copy = copy_module(block)
    _multiply(copy.norms(), copy.linears(), factors, _traced)
    return copy


@jax.jit
def _forward(block: Block, factors: Factors, residual: jax.Array) -> jax.Array:
    return _with_factors(block, factors)(residual)


@jax.jit
def _backward(block: Block, factors: Factors, residual: jax.Array, pull: jax.Array) -> tuple[Factors, jax.Array]:
    """The gradients of factors and input, from that of the output; the block runs again for them."""
    _, transpose = jax.vjp(lambda *moved: _with_factors(block, moved[0])(moved[1]), factors, residual)
    return transpose(pull)


def _distance(head: Decoder, factors: Factors, residual: jax.Array, teacher: Decoder, wanted: jax.Array) -> jax.Array:
    """The mean divergence of predictions from the float model's, which its residual stream gives."""
    target = jax.nn.log_softmax(teacher.logits(wanted))
    tuned = copy_module(head)
    _multiply(tuned.norms(), {}, factors, _traced)
    predicted = jax.nn.log_softmax(tuned.logits(residual))
    return jnp.mean(jnp.sum(jnp.exp(target) * (target - predicted), axis=-1))


_measure_distance = jax.jit(_distance)
_pull_distance = jax.jit(jax.grad(_distance, argnums=(1, 2)))


_embed = jax.jit(lambda head, tokens: head.embed(tokens))
_run = jax.jit(lambda block, residual: block(residual))


def float_streams(params: Decoder, batches: Sequence[Int[np.ndarray, "b S"]]) -> list[Float[jax.Array, "b S D"]]:
    """The residual stream after the last block of the float model, with one block on the device at a time."""
    head = to_device(params.embedder())
    streams = [_embed(head, jnp.asarray(tokens)) for tokens in batches]
    for block in params.layers:
        work = to_device(block)
        streams = [_run(work, stream) for stream in streams]
    return streams


def _streams(model: Decoder, head: Decoder, blocks: Sequence[Factors], lesson: Lesson) -> list[jax.Array]:
    """The residual stream before the first block and after each."""
    streams = [_embed(head, jnp.asarray(lesson.tokens))]
    for block, factors in zip(model.layers, blocks, strict=True):
        streams.append(_forward(block, factors, streams[-1]))
    return streams


def _gradient(model: Decoder, teacher: Decoder, blocks: list[Factors], norm: Factors, lessons: Sequence[Lesson]) -> Trained:
    """The gradient of the mean divergence over lessons."""
    head = model.without_blocks()
    total: Trained | None = None
    for lesson in lessons:
        streams = _streams(model, head, blocks, lesson)
        of_norm, pull = _pull_distance(head, norm, streams[-1], teacher, lesson.residual)
        of_blocks = []
        for block, factors, stream in zip(model.layers[::-1], blocks[::-1], streams[-2::-1], strict=True):
            of_block, pull = _backward(block, factors, stream, pull)
            of_blocks.append(of_block)
        of_lesson = (of_blocks[::-1], of_norm)
        total = of_lesson if total is None else _add(total, of_lesson)
    if total is None:
        raise ValueError("a step needs at least one lesson")
    return total


_add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=(0, 1))
def _update(
    trained: Trained,
    state: optax.OptState,
    gradient: Trained,
    optimizer: optax.GradientTransformation,
) -> tuple[Trained, optax.OptState]:
    # Adam does not depend on the size of gradients, so that a sum over lessons serves as their mean. Optax mixes dtypes.
    with jax.numpy_dtype_promotion("standard"):
        updates, state = optimizer.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state


def _divergence(model: Decoder, teacher: Decoder, blocks: Sequence[Factors], norm: Factors, lessons: Sequence[Lesson]) -> float:
    head = model.without_blocks()
    divergences = [
        float(_measure_distance(head, norm, _streams(model, head, blocks, lesson)[-1], teacher, lesson.residual))
        for lesson in lessons
    ]
    return float(np.mean(divergences))


def _applied(params: Decoder, blocks: Sequence[Factors], norm: Factors) -> Decoder:
    """The decoder with its scales and norms multiplied, each rounded to the dtype that it had; in host memory."""
    decoder = copy_module(params)
    _multiply(decoder.norms(), {}, norm, _rounded)
    for block, factors in zip(decoder.layers, blocks, strict=True):
        _multiply(block.norms(), block.linears(), factors, _rounded)
    return decoder

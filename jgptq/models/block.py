"""A decoder block as a list of stages: one idea for the forward pass, the calibration and the quantization."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from jgptq.models.architecture.config import LayerConfig, ModelConfig
from jgptq.models.latent import LatentAttention, latent_stages
from jgptq.models.layers import Fused, Linear, Norm, make_norm
from jgptq.models.mixture.linears import ExpertLinear
from jgptq.models.mixture.mlp import SparseMLP
from jgptq.models.mixture.routing import dispatch
from jgptq.models.mixture.stages import sparse_stages
from jgptq.models.stages import RESIDUAL, Stage, block_stages, head_stages
from jgptq.models.sublayers import MLP, Attention
from jgptq.notation import Float

Carry = Mapping[str, Any]
"""What flows from stage to stage: named branches, arrays `[b, S, K]` as a rule, one of which is the residual stream."""


class Unit(nnx.Module):
    """What is quantized as one, in stages: its linears share a place in a sink.

    The forward pass is `carry = unit.run(stage, carry)` over `unit.stages()`, and `run` is

        h = unit.inputs(stage, carry)
        outputs = {path: linear(h) for each linear of the stage}
        carry = unit.combine(stage, carry, outputs)
    """

    config: ModelConfig

    def stages(self) -> tuple[Stage, ...]:
        """The stages in the order of the forward pass; the same for all units of a kind."""
        raise NotImplementedError

    def linears(self) -> dict[str, Linear | ExpertLinear]:
        """Every linear by its path; those that were fused for serving as one, by the name that readers give it; those of all
        experts as one stack."""
        paths = dict.fromkeys(path for stage in self.stages() for path in (*(f.name for f in stage.fusions), *stage.linears))
        modules = {path: submodule(self, path) for path in paths}
        return {path: getattr(module, "linear", module) for path, module in modules.items() if module is not None}

    def norms(self) -> dict[str, Norm]:
        """Every norm that a stage names, by its path: those of the residual stream and of what is added to it."""
        paths = dict.fromkeys(path for stage in self.stages() for path in (*stage.through, *stage.norms))
        modules = {path: submodule(self, path) for path in paths}
        return {path: module for path, module in modules.items() if isinstance(module, Norm)}

    def inputs(self, stage: Stage, carry: Carry) -> Float[jax.Array, "*batch K"]:
        """What the linears of a stage read: activations `[b, S, K]`, or rows `[P, K]` that are sorted by expert."""
        h = carry[stage.reads]
        for path in stage.through:
            h = submodule(self, path)(h)
        return dispatch(h, carry[stage.routing]) if stage.routing is not None and stage.gathers else h

    def combine(self, stage: Stage, carry: Carry, outputs: Mapping[str, jax.Array]) -> Carry:
        """The carry after a stage, from the outputs of its linears by path. A branch ends with the last stage that reads it."""
        after = dict(carry)
        for step in stage.steps:
            norm = None if step.norm is None else submodule(self, step.norm)
            taken = [after[branch] for branch in step.takes]
            after[step.to] = STEPS[step.name](self, [outputs[path] for path in step.of], after.get(step.to), norm, *taken)
        later = self.stages()[self.stages().index(stage) + 1 :]
        for branch in stage.uses.difference([RESIDUAL], *(other.uses for other in later)):
            del after[branch]
        return after

    def run(self, stage: Stage, carry: Carry) -> Carry:
        """The carry after a stage."""
        return self.combine(stage, carry, self.outputs(stage, carry))

    def outputs(self, stage: Stage, carry: Carry) -> dict[str, Float[jax.Array, "*batch N"]]:
        """What a stage's linears give, by path."""
        h = self.inputs(stage, carry)
        outputs: dict[str, jax.Array] = {}
        for fusion in stage.fusions:
            fused = submodule(self, fusion.name)
            if isinstance(fused, Fused):
                outputs |= zip(fusion.linears, fused(h), strict=True)
        routing = () if stage.routing is None else (carry[stage.routing],)
        outputs |= {path: submodule(self, path)(h, *routing) for path in stage.linears if path not in outputs}
        return outputs


def submodule(module: nnx.Module, path: str) -> Any:
    """The module at a dotted path, or None where there is none."""
    inner: Any = module
    for name in path.split("."):
        inner = getattr(inner, name, None)
    return inner


def _add(unit: Unit, outputs: list[jax.Array], stream: jax.Array, norm: Norm | None) -> jax.Array:
    added = stream + outputs[0]
    return added if norm is None else norm(added)


STEPS: Mapping[str, Callable[..., jax.Array]] = {
    "attention": lambda block, outputs, _, norm: block.self_attn.mix(*block.self_attn.parts(outputs)),
    "gate": lambda block, outputs, _, norm: block.mlp.gated(outputs),
    "activation": lambda block, outputs, _, norm: block.mlp.activate(outputs[0]),
    "add": _add,
    "add_scaled": lambda unit, outputs, stream, norm: stream + outputs[0] * unit.config.residual_multiplier,
    "add_normed": lambda unit, outputs, stream, norm: stream + norm(outputs[0]),
    "latent": lambda block, outputs, _, norm: block.self_attn.split(outputs[0])[0],
    "shared_keys": lambda block, outputs, _, norm: block.self_attn.split(outputs[0])[1],
    "latent_attention": lambda block, outputs, _, norm, q, shared_k: block.self_attn.mix(q, outputs[0], shared_k),
    "route": lambda block, outputs, _, norm, stream: block.mlp.route(norm(stream)),
    "share": lambda block, outputs, _, norm, stream: block.mlp.share(norm(stream)),
    "add_experts": lambda block, outputs, stream, norm, routing: block.mlp.joined(outputs[0], routing, stream),
    "add_share": lambda unit, outputs, stream, norm, share: stream + share * outputs[0],
    "keep": lambda unit, outputs, _, norm: outputs[0],
}
"""What can follow the linears of a stage: functions of the unit, the outputs of the step's linears, the branch that the result
replaces, the step's norm, and the branches that it takes."""


class Block(Unit):
    """One decoder block: attention, then an MLP.

    With r the residual stream, the block's form says where the norms of a sublayer f stand:

        pre                 r + f(norm(r))
        parallel            r + attention(norm(r)) + mlp(norm(r)), one norm for both
        parallel_two_norms  r + attention(attn_norm(r)) + mlp(mlp_norm(r))
        post                norm(r + f(r))
        output              r + norm(f(r))
        sandwich            r + out_norm(f(norm(r)))

    Both sublayers of a parallel block read the r that the block began with: its stages open the MLP before attention adds to the
    stream.

    Args:
      config: the decoder's switches.
      layer: the window and the rotation of this block, and whether its MLP is a mixture of experts.
      rngs: source of initial kernels.
    """

    def __init__(self, config: ModelConfig, layer: LayerConfig, *, rngs: nnx.Rngs):
        form = config.block_form
        self.attn_norm = make_norm(config)
        self.attn_out_norm = make_norm(config) if form == "sandwich" else None
        attention = Attention if config.latent is None else LatentAttention
        self.self_attn = attention(config, layer, rngs=rngs)
        self.mlp_norm = None if form == "parallel" else make_norm(config)
        self.mlp_out_norm = make_norm(config) if form == "sandwich" else None
        self.mlp = SparseMLP(config, rngs=rngs) if layer.sparse else MLP(config, rngs=rngs)
        self.config = config

    def stages(self) -> tuple[Stage, ...]:
        """The stages of a dense block, or of one with experts."""
        stages = sparse_stages(self.config) if isinstance(self.mlp, SparseMLP) else block_stages(self.config)
        if self.config.latent is None:
            return stages
        _, close_attention, *mlp = stages
        return (*latent_stages(self.config), dataclasses.replace(close_attention, absorber=None), *mlp)

    def __call__(self, residual: Float[jax.Array, "b S D"]) -> Float[jax.Array, "b S D"]:
        """Runs all stages on a residual stream."""
        carry: Carry = {RESIDUAL: residual}
        for stage in self.stages():
            carry = self.run(stage, carry)
        return carry[RESIDUAL]


class Head(Unit):
    """What follows the last block, as a unit of one stage: the output projection, which reads the norm of the residual stream.

    Args:
      config: the decoder's switches.
      norm: the decoder's last norm, where it has one.
      project_out: from the width of the stream to that of token vectors, where they differ.
      lm_head: the output projection.
    """

    def __init__(self, config: ModelConfig, norm: Norm | None, project_out: Linear | None, lm_head: Linear):
        self.norm = norm
        self.project_out = project_out
        self.lm_head = lm_head
        self.config = config

    def stages(self) -> tuple[Stage, ...]:
        """The output projection."""
        return head_stages(self.config)

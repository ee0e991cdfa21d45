"""A stage as data: the linears of a decoder block that read the same activations, and what happens around them, by names.

Everything that asks about the structure of a block reads it here: the forward pass and the calibration (what is read, what
follows), the planner and the file config (which linears readers fuse), serving (which to fuse), the shift of targets (what joins
the residual stream). A stage holds no arrays and no functions, so it is hashable and the same object for all blocks of a kind.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from jgptq.models.architecture.config import ModelConfig

RESIDUAL = "residual"
"""The branch of a carry that is the residual stream."""

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fusion:
    """Linears that readers fuse into one matrix, so that they need the same settings.

    That linears share a Hessian does not say that they are fused: the stage says the former, this the latter. What a file holds
    as one matrix is one linear of the stage, and no fusion.
    """

    name: str  # dotted path that readers give the one matrix
    linears: tuple[str, ...]  # dotted paths, in the order of its columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What happens to outputs of a stage's linears: a function of them whose result is a branch of the carry."""

    name: str  # the function, in `jgptq.models.block.STEPS`
    of: tuple[str, ...]  # the linears whose outputs it takes
    to: str  # the branch that it writes
    norm: str | None = None  # dotted path of a norm within the unit that the function applies
    takes: tuple[str, ...] = ()  # branches that it takes besides the one that it writes
    decides: bool = False  # whether it chooses: the float model then follows the choice of the quantized one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """Linears that read the same activations, so that they share one Hessian.

    With h the branch `reads`, passed `through` modules, the stage computes `linear(h)` for each of its linears, then its steps.
    Linears that are stacked over experts take rows that are sorted by expert, and the routing that sorted them.
    """

    linears: tuple[str, ...]  # dotted paths within the unit
    reads: str  # the branch of the carry
    through: tuple[str, ...] = ()  # dotted paths of modules that the branch passes in this order before the linears read it
    routing: str | None = None  # the branch that says which expert each row goes to; None: the linears are no stacks
    gathers: bool = False  # whether the rows have yet to be gathered from tokens
    steps: tuple[Step, ...]  # what follows
    fusions: tuple[Fusion, ...] = ()  # which of the linears readers fuse
    absorber: str | None = None  # a norm or linear, in whose output features a scale of the stage's inputs can be absorbed

    @property
    def adds(self) -> bool:
        """Whether the output is added to the residual stream as it is; the stream may be normed after that."""
        return any(step.name == "add" and step.to == RESIDUAL for step in self.steps)

    @property
    def uses(self) -> frozenset[str]:
        """The branches that it needs of the carry."""
        routing = () if self.routing is None else (self.routing,)
        return frozenset((self.reads, *routing, *(branch for step in self.steps for branch in step.takes)))

    def decisions(self, carry: Mapping[str, Any]) -> dict[str, Any]:
        """The branches of the carry after the stage that are choices, see `Step.decides`."""
        return {step.to: carry[step.to] for step in self.steps if step.decides}

    @property
    def norms(self) -> tuple[str, ...]:
        """Dotted paths of the norms of its steps."""
        return tuple(step.norm for step in self.steps if step.norm is not None)


@functools.cache
def block_stages(config: ModelConfig) -> tuple[Stage, ...]:
    """The stages of a dense decoder block.

    Args:
      config: the decoder's switches.

    Returns:
      Four stages: q/k/v, the attention's output, the linears that open the MLP, the one that closes it. Of a parallel block, all
      that read the stream come first, because they read it before attention adds to it; where they share a norm, they are one
      stage with one Hessian.
    """
    form, heads = config.block_form, config.num_attention_heads
    qkv = QKV if config.qkv_layout is None else ("self_attn.qkv_proj",)
    opening = _opening(config)
    attend = Step(name="attention", of=qkv, to="attended")
    activate = Step(name="gate" if config.gated_mlp else "activation", of=opening, to="hidden")
    qkv_fusions = _fusions("self_attn.qkv_proj", qkv)
    opening_fusions = _fusions("mlp.gate_up_proj", opening)
    # A head mixes each feature of its values by itself, so that their scales are those of its output, but for clipped ones. Where
    # the values are a part of a fused linear, no linear takes such a scale on all its outputs.
    close_attention = Stage(
        linears=("self_attn.o_proj",),
        reads="attended",
        steps=(_joins("self_attn.o_proj", "attn", config),),
        absorber="self_attn.v_proj" if qkv == QKV and heads == config.num_key_value_heads and config.clip_qkv is None else None,
    )
    close_mlp = Stage(
        linears=("mlp.down_proj",),
        reads="hidden",
        steps=(_joins("mlp.down_proj", "mlp", config),),
        # The up projection is a factor of what is read; without a gate the activation has to be positively homogeneous.
        absorber="mlp.up_proj" if opening[-1] == "mlp.up_proj" and (config.gated_mlp or config.hidden_act == "relu") else None,
    )
    if form == "parallel":
        open_both = _opens(qkv + opening, "attn_norm", (attend, activate), qkv_fusions + opening_fusions, config)
        return open_both, close_attention, close_mlp
    open_attention = _opens(qkv, "attn_norm", (attend,), qkv_fusions, config)
    open_mlp = _opens(opening, "mlp_norm", (activate,), opening_fusions, config)
    if form == "parallel_two_norms":
        return open_attention, open_mlp, close_attention, close_mlp
    return open_attention, close_attention, open_mlp, close_mlp


def _opening(config: ModelConfig) -> tuple[str, ...]:
    """The linears that open the MLP."""
    if config.gate_up_fused:
        return ("mlp.gate_up_proj",)
    return ("mlp.gate_proj", "mlp.up_proj") if config.gated_mlp else ("mlp.up_proj",)


def _fusions(name: str, linears: tuple[str, ...]) -> tuple[Fusion, ...]:
    """The fusion of several linears; none of one, as where the file holds them fused."""
    return (Fusion(name=name, linears=linears),) if len(linears) > 1 else ()


def _opens(
    linears: tuple[str, ...], norm: str, steps: tuple[Step, ...], fusions: tuple[Fusion, ...], config: ModelConfig
) -> Stage:
    """A stage that reads the residual stream, through a norm where the block's form has one there."""
    normed = config.block_form in ("pre", "parallel", "parallel_two_norms", "sandwich")
    return Stage(
        linears=linears,
        reads=RESIDUAL,
        through=(norm,) if normed else (),
        steps=steps,
        fusions=fusions,
        absorber=norm if normed and config.norm_affine else None,
    )


def _joins(linear: str, sublayer: str, config: ModelConfig) -> Step:
    """How the output of a sublayer, "attn" or "mlp", joins the residual stream."""
    form = config.block_form
    if form in ("output", "sandwich"):
        norm = f"{sublayer}_norm" if form == "output" else f"{sublayer}_out_norm"
        return Step(name="add_normed", of=(linear,), to=RESIDUAL, norm=norm)
    if config.residual_multiplier != 1.0:
        return Step(name="add_scaled", of=(linear,), to=RESIDUAL)
    return Step(name="add", of=(linear,), to=RESIDUAL, norm=f"{sublayer}_norm" if form == "post" else None)


@functools.cache
def head_stages(config: ModelConfig) -> tuple[Stage, ...]:
    """The one stage of an output projection that is not tied to the embedding."""
    through = (("norm",) if config.has_final_norm else ()) + (("project_out",) if config.projects else ())
    keep = Step(name="keep", of=("lm_head",), to="logits")
    absorber = "norm" if through == ("norm",) and config.norm_affine else None
    return (Stage(linears=("lm_head",), reads=RESIDUAL, through=through, steps=(keep,), absorber=absorber),)

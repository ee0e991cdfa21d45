"""The stages of a decoder block whose MLP is a mixture of experts."""

import dataclasses
import functools

from jgptq.models.architecture.config import ModelConfig
from jgptq.models.stages import RESIDUAL, Fusion, Stage, Step, block_stages

ROUTING = "routing"
EXPERTS = ("mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.down_proj")
_SHARED = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")


@functools.cache
def sparse_stages(config: ModelConfig) -> tuple[Stage, ...]:
    """The stages of a block with experts.

    The router chooses when the attention has been added to the stream, so that the routing is a branch of the carry which both
    stages of the experts read. A shared MLP joins the stream after the experts: what they lost, its last linear can make up for.

    Args:
      config: the decoder's switches, with experts.

    Returns:
      The stages of attention; the linears that open the experts, and those that open a shared MLP; those that close the experts,
      and the one that closes the shared MLP.
    """
    *attention, close_attention, open_mlp, _ = block_stages(config)
    assert config.experts is not None
    chooses = Step(name="route", of=(), to=ROUTING, norm="mlp_norm", takes=(RESIDUAL,), decides=True)
    share = Step(name="share", of=(), to="share", norm="mlp_norm", takes=(RESIDUAL,))
    decisions = (chooses, share) if config.experts.shared_gate else (chooses,)
    close_attention = dataclasses.replace(close_attention, steps=(*close_attention.steps, *decisions))
    open_experts = dataclasses.replace(
        open_mlp,
        linears=EXPERTS[:2],
        routing=ROUTING,
        gathers=True,
        steps=(Step(name="gate", of=EXPERTS[:2], to="hidden"),),
        fusions=(),
        absorber=None,
    )
    close_experts = Stage(
        linears=EXPERTS[2:],
        reads="hidden",
        routing=ROUTING,
        steps=(Step(name="add_experts", of=EXPERTS[2:], to=RESIDUAL, takes=(ROUTING,)),),
    )
    if not config.experts.shared_width:
        return (*attention, close_attention, open_experts, close_experts)
    open_shared = dataclasses.replace(
        open_mlp,
        linears=_SHARED,
        steps=(Step(name="gate", of=_SHARED, to="shared_hidden"),),
        fusions=(Fusion(name="mlp.shared_expert.gate_up_proj", linears=_SHARED),),
        absorber=None,
    )
    down = ("mlp.shared_expert.down_proj",)
    shares = Step(name="add_share", of=down, to=RESIDUAL, takes=("share",))
    close_shared = Stage(
        linears=down,
        reads="shared_hidden",
        steps=(shares if config.experts.shared_gate else Step(name="add", of=down, to=RESIDUAL),),
        absorber=_SHARED[1],
    )
    return (*attention, close_attention, open_experts, open_shared, close_experts, close_shared)

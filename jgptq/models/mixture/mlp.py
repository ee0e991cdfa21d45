"""A mixture of experts in place of an MLP: a router, the linears of all experts, and an MLP that every token passes."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jgptq.models.architecture.config import ModelConfig
from jgptq.models.architecture.experts import ExpertsConfig
from jgptq.models.layers import Linear
from jgptq.models.mixture.linears import ExpertLinear
from jgptq.models.mixture.routing import Routing, arrange, choose, collect
from jgptq.models.sublayers import MLP, activation
from jgptq.notation import Float


class Experts(nnx.Module):
    """The stacked linears of all experts of a block.

    Args:
      config: the decoder's switches.
      rngs: source of initial kernels.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        assert config.experts is not None
        experts, width, inner = config.experts.num_experts, config.hidden_size, config.experts.width
        self.gate_proj = ExpertLinear(experts, width, inner, rngs=rngs)
        self.up_proj = ExpertLinear(experts, width, inner, rngs=rngs)
        self.down_proj = ExpertLinear(experts, inner, width, rngs=rngs)


class Router(Linear):
    """The linear whose outputs are the experts' logits; it is never quantized.

    Args:
      width: D.
      switches: how it chooses.
      rngs: source of the initial kernel.
    """

    def __init__(self, width: int, switches: ExpertsConfig, *, rngs: nnx.Rngs):
        super().__init__(width, switches.num_experts, rngs=rngs)
        corrected = nnx.Param(jnp.zeros(switches.num_experts, jnp.float32)) if switches.corrected else None
        self.e_score_correction_bias: nnx.Param | None = corrected


class SparseMLP(nnx.Module):
    """A mixture of experts, `sum_e w_e down_e(act(gate_e(h)) * up_e(h))` over the experts that a router chooses for a token.

    With a shared MLP, `shared(h)` is added for every token, or `sigmoid(h g) shared(h)`.

    Args:
      config: the decoder's switches.
      rngs: source of initial kernels.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        assert config.experts is not None
        switches = config.experts
        self.router = Router(config.hidden_size, switches, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)
        shared = dataclasses.replace(config, intermediate_size=switches.shared_width)
        self.shared_expert = MLP(shared, rngs=rngs) if switches.shared_width else None
        self.shared_expert_gate = Linear(config.hidden_size, 1, rngs=rngs) if switches.shared_gate else None
        self.hidden_act = config.hidden_act
        self.switches = switches

    def route(self, h: Float[jax.Array, "b S D"]) -> Routing:
        """Where the tokens go."""
        logits = self.router(h.reshape(-1, h.shape[-1])).astype(jnp.float32)
        correction = self.router.e_score_correction_bias
        correction_e = None if correction is None else jnp.asarray(correction.get_value(), jnp.float32)
        return arrange(*choose(logits, self.switches, correction_e), self.switches.num_experts)

    def gated(self, outputs: Sequence[jax.Array]) -> Float[jax.Array, "*batch K"]:
        """`act(gate) * up`, from the outputs of the linears that make gate and up: those of experts, or of the shared MLP."""
        gate, up = outputs
        return activation(self.hidden_act)(gate) * up

    def joined(self, y_pn: Float[jax.Array, "P D"], routing: Routing, stream: Float[jax.Array, "b S D"]) -> jax.Array:
        """The stream with the outputs of its tokens' experts added."""
        return stream + collect(y_pn, routing).reshape(stream.shape)

    def share(self, h: Float[jax.Array, "b S D"]) -> Float[jax.Array, "b S 1"]:
        """The factor of the shared MLP's output."""
        assert self.shared_expert_gate is not None
        return jax.nn.sigmoid(self.shared_expert_gate(h))

"""A mixture of experts in place of an MLP: a router, linears that are stacked over experts, and MLPs that all tokens pass.

On a device the kernels of E experts are one array `[E, K, N]`, or one stack of packed tensors. Files hold them one by one, so
that a stack which was read from a file is a tuple of views until it is moved to a device.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jgptq.errors import CheckpointError
from jgptq.models.architecture.config import ModelConfig
from jgptq.models.architecture.experts import ExpertsConfig
from jgptq.models.layers import Linear
from jgptq.models.packed import PackedTensor
from jgptq.models.routing import Routing, arrange, choose, collect, grouped_product
from jgptq.models.sublayers import MLP, activation
from jgptq.notation import Array, Float
from pallas_kernels.packing import pack_codes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerExpert:
    """A leaf of stacked linears whose experts lie apart, as views of files for example."""

    parts: tuple[Any, ...]  # of each expert: an array, or a `PackedTensor`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedExperts:
    """The packed kernels of all experts, alike in bits, groups and grid."""

    stack: PackedTensor  # each of its arrays with a leading axis E

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, K, N)."""
        return self.stack.qweight.shape[0], *self.stack.shape

    @property
    def scales(self) -> Array:
        """`[E, G, N]`."""
        return self.stack.scales

    def with_scales(self, scales: Array) -> "PackedExperts":
        """The same codes on other scales."""
        return PackedExperts(dataclasses.replace(self.stack, scales=scales))

    def dequantize(self) -> Float[jax.Array, "E K N"]:
        """The float32 kernels, rows as in the file."""
        return jax.vmap(PackedTensor.dequantize)(self.stack)

    def expert(self, index: int) -> PackedTensor:
        """The kernel of one expert."""
        return jax.tree.map(lambda leaf: leaf[index], self.stack)


def stack_parts(leaf: PerExpert) -> np.ndarray | PackedExperts:
    """The leaf as one array, or one stack of packed tensors, in host memory.

    Raises:
      CheckpointError: packed experts that differ in bits or group size.
    """
    if not isinstance(leaf.parts[0], PackedTensor):
        return np.stack([np.asarray(part) for part in leaf.parts])
    return PackedExperts(jax.tree.map(lambda *parts: np.stack([np.asarray(part) for part in parts]), *_alike(leaf.parts)))


def _alike(parts: Sequence[PackedTensor]) -> list[PackedTensor]:
    """The tensors with zero points and indices of groups in all of them, where some have them."""
    if kinds := {(part.bits, part.group_size, part.shape) for part in parts} - {
        (parts[0].bits, parts[0].group_size, parts[0].shape)
    }:
        raise CheckpointError(
            f"experts of one layer must have the same bits, group size and shape; found {(parts[0].bits, parts[0].group_size)} "
            f"and {', '.join(map(str, sorted(kinds)))}; quantize them with the same settings"
        )
    if any(part.zeros is not None for part in parts):
        parts = [dataclasses.replace(part, zeros=_zeros(part)) for part in parts]
    if any(part.group_index is not None for part in parts):
        parts = [dataclasses.replace(part, group_index=_group_index(part)) for part in parts]
    return list(parts)


def _zeros(part: PackedTensor) -> Array:
    if part.zeros is not None:
        return part.zeros
    middle_ng = jnp.full(part.scales.shape[::-1], 2 ** (part.bits - 1), jnp.int32)
    return np.asarray(pack_codes(middle_ng, part.bits).T)


def _group_index(part: PackedTensor) -> Array:
    if part.group_index is not None:
        return part.group_index
    k, groups = part.shape[0], part.scales.shape[0]
    return (np.arange(k) // (k // groups)).astype(np.int32)


def expert_part(leaf: Any, index: int) -> Any:
    """One expert's part of a stacked leaf: an array, shapes alone, or a `PackedTensor`."""
    if isinstance(leaf, PerExpert):
        return leaf.parts[index]
    if isinstance(leaf, PackedExperts):
        return leaf.expert(index)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    return leaf[index]


class ExpertLinear(nnx.Module):
    """`y = h @ kernel[e] + bias[e]` for rows that are sorted by their expert e.

    Args:
      experts: E.
      k: in-features.
      n: out-features.
      use_bias: whether there are biases `[E, N]`.
      rngs: source of the initial kernels, normal with standard deviation 0.02.
    """

    def __init__(self, experts: int, k: int, n: int, *, use_bias: bool = False, rngs: nnx.Rngs):
        self.kernel: nnx.Param = nnx.Param(jax.random.normal(rngs.params(), (experts, k, n), jnp.float32) * 0.02)
        self.bias: nnx.Param | None = nnx.Param(jnp.zeros((experts, n), jnp.float32)) if use_bias else None
        self.experts = experts
        self.features = (k, n)

    def __call__(self, h: Float[jax.Array, "P K"], routing: Routing) -> Float[jax.Array, "P N"]:
        """The outputs of sorted rows, in the dtype of `h`."""
        y = grouped_product(h, _dense(self.kernel.get_value(), h.dtype), routing)
        if self.bias is None:
            return y
        bias_en = _dense(self.bias.get_value(), h.dtype)
        return y + jnp.repeat(bias_en[routing.expert_c], routing.block, axis=0)

    def expert(self, index: int) -> "Expert":
        """One of the linears."""
        return Expert(self, index)


def _dense(leaf: Any, dtype: jnp.dtype) -> jax.Array:
    """All experts' parts of a leaf as one array."""
    if isinstance(leaf, PerExpert):
        parts = [part.dequantize() if isinstance(part, PackedTensor) else jnp.asarray(part) for part in leaf.parts]
        return jnp.stack(parts).astype(dtype)
    return (leaf.dequantize() if isinstance(leaf, PackedExperts) else jnp.asarray(leaf)).astype(dtype)


class Expert:
    """One linear of a stack, with the parameters that a `Linear` has; setting one sets its part of the stack.

    Args:
      stack: the linears of all experts.
      index: which one.
    """

    def __init__(self, stack: ExpertLinear, index: int):
        self.__dict__.update(stack=stack, index=index)

    def __getattr__(self, name: str) -> "_Part":
        return _Part(getattr(self.__dict__["stack"], name), self.__dict__["index"])

    def __setattr__(self, name: str, param: nnx.Param) -> None:
        getattr(self, name).set_value(param.get_value())


class _Part:
    """One expert's part of a parameter."""

    def __init__(self, param: nnx.Param, index: int):
        self._param, self._index = param, index

    def get_value(self) -> Any:
        return expert_part(self._param.get_value(), self._index)

    def set_value(self, value: Any) -> None:
        leaf = self._param.get_value()
        experts = leaf.shape[0] if not isinstance(leaf, PerExpert) else len(leaf.parts)
        parts = list(leaf.parts) if isinstance(leaf, PerExpert) else [expert_part(leaf, index) for index in range(experts)]
        parts[self._index] = value
        self._param.set_value(PerExpert(tuple(parts)))


def single_linears(path: str, linear: Linear | ExpertLinear) -> Iterator[tuple[str, Linear | Expert]]:
    """The linears that one stands for, as files, rules and reports have them: a stack is one linear for each expert."""
    if isinstance(linear, Linear):
        yield path, linear
        return
    before, _, name = path.rpartition(".")
    for index in range(linear.experts):
        yield f"{before}.{index}.{name}", linear.expert(index)


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

    def activate(self, opening: Float[jax.Array, "*batch K"]) -> Float[jax.Array, "*batch K"]:
        """The activation, elementwise."""
        return activation(self.hidden_act)(opening)

    def joined(self, y_pn: Float[jax.Array, "P D"], routing: Routing, stream: Float[jax.Array, "b S D"]) -> jax.Array:
        """The stream with the outputs of its tokens' experts added."""
        return stream + collect(y_pn, routing).reshape(stream.shape)

    def share(self, h: Float[jax.Array, "b S D"]) -> Float[jax.Array, "b S 1"]:
        """The factor of the shared MLP's output."""
        assert self.shared_expert_gate is not None
        return jax.nn.sigmoid(self.shared_expert_gate(h))

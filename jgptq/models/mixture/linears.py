"""The same linear of all experts as one module, and a view of each by itself."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jgptq.models.layers import Linear
from jgptq.models.mixture.leaves import PerExpert, dense, expert_part
from jgptq.models.mixture.routing import Routing, grouped_product
from jgptq.notation import Float


class ExpertLinear(nnx.Module):
    """`y = h @ kernel[e]` for rows that are sorted by their expert e.

    Args:
      experts: E.
      k: in-features.
      n: out-features.
      rngs: source of the initial kernels, normal with standard deviation 0.02.
    """

    def __init__(self, experts: int, k: int, n: int, *, rngs: nnx.Rngs):
        self.kernel: nnx.Param = nnx.Param(jax.random.normal(rngs.params(), (experts, k, n), jnp.float32) * 0.02)
        self.experts = experts
        self.features = (k, n)

    def __call__(self, h: Float[jax.Array, "P K"], routing: Routing) -> Float[jax.Array, "P N"]:
        """The outputs of sorted rows, in the dtype of `h`."""
        return grouped_product(h, dense(self.kernel.get_value(), h.dtype), routing)

    def expert(self, index: int) -> "Expert":
        """One of the linears."""
        return Expert(self, index)


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

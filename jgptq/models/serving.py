"""A quantized decoder made ready to be served: kernels in the layout that GPU kernels read."""

import jax
import jax.numpy as jnp
from flax import nnx

from jgptq.errors import ConfigError
from jgptq.models import Decoder
from jgptq.models.layers import Fused, Linear
from jgptq.models.memory import to_device
from jgptq.models.packed import PackedTensor, RuntimeTensor, at_runtime
from pallas_kernels.int4_matmul.planes import fuse, obstacle


def for_serving(params: Decoder) -> Decoder:
    """Converts every packed kernel of 4 and 8 bits to the runtime layout, once; other leaves are moved to the device.

    The result computes what `params` does, on a GPU with kernels that read packed codes. Those of q, k and v, and of gate and up,
    become one where they agree in width, groups, grid and order of rows, as they do in all that jgptq makes. It is not what files
    hold: save `params`.

    Args:
      params: a quantized decoder.

    Returns:
      The decoder to serve.

    Raises:
      ConfigError: the decoder is not quantized.
    """
    if params.quantization is None:
        raise ConfigError("the decoder is not quantized, so there is nothing to convert; see jgptq.run.driver")
    decoder = jax.tree.map(lambda leaf: leaf, params)
    linears = [linear for block in decoder.layers for stage in block.stages() for linear in stage.linears]
    linears += [] if decoder.lm_head is None else [decoder.lm_head]
    for linear in linears:
        _convert(linear)
    for block in decoder.layers:
        _fuse(block.self_attn, ("q_proj", "k_proj", "v_proj"), "qkv")
        _fuse(block.mlp, ("gate_proj", "up_proj"), "gate_up")
    return to_device(decoder)


def _convert(linear: Linear) -> None:
    kernel = linear.kernel.get_value()
    if isinstance(kernel, PackedTensor):
        linear.kernel = nnx.Param(at_runtime(kernel))


def _fuse(parent: nnx.Module, names: tuple[str, ...], fused: str) -> None:
    """Puts one linear in the place of several, where their kernels can lie side by side."""
    linears = [getattr(parent, name) for name in names]
    found = [linear.kernel.get_value() for linear in linears]
    kernels = [tensor.kernel for tensor in found if isinstance(tensor, RuntimeTensor)]
    biases = [linear.bias.get_value() for linear in linears if linear.bias is not None]
    if len(kernels) < len(names) or len(biases) not in (0, len(names)) or obstacle(kernels):
        return
    one = linears[0]
    one.kernel = nnx.Param(RuntimeTensor(kernel=fuse(kernels)))
    if biases:
        one.bias = nnx.Param(jnp.concatenate([jnp.asarray(bias) for bias in biases]))
    for name in names:
        delattr(parent, name)
    setattr(parent, fused, nnx.data(Fused(one, tuple(kernel.layout.n for kernel in kernels))))

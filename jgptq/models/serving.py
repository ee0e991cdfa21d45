"""A quantized decoder made ready to be served: kernels in the layout that GPU kernels read."""

import jax.numpy as jnp
from flax import nnx

from jgptq.errors import ConfigError
from jgptq.models.block import Unit, submodule
from jgptq.models.decoder import Decoder
from jgptq.models.layers import Fused, Linear
from jgptq.models.memory import copy_module, to_device
from jgptq.models.packed import PackedTensor, RuntimeTensor, at_runtime
from jgptq.models.stages import Fusion
from pallas_kernels.int4_matmul.planes import fuse, obstacle


def for_serving(params: Decoder) -> Decoder:
    """Converts every packed kernel of 4 and 8 bits to the runtime layout, once; other leaves are moved to the device.

    The result computes what `params` does, on a GPU with kernels that read packed codes. Linears that readers fuse
    (`Stage.fusions`) become one where they agree in width, groups, grid and order of rows, as in all that jgptq makes. The
    linears of experts stay packed as in files, and are expanded when they are used. Files do not hold the result: save `params`.

    Args:
      params: a quantized decoder.

    Returns:
      The decoder to serve.

    Raises:
      ConfigError: the decoder is not quantized.
    """
    if params.quantization is None:
        raise ConfigError("the decoder is not quantized, so there is nothing to convert; see jgptq.run.driver")
    decoder = copy_module(params)
    for unit in (*decoder.layers, *filter(None, [decoder.head()])):
        for linear in unit.linears().values():
            if isinstance(linear, Linear):
                _convert(linear)
        for fusion in (fusion for stage in unit.stages() for fusion in stage.fusions):
            _fuse(unit, fusion)
    return to_device(decoder)


def _convert(linear: Linear) -> None:
    kernel = linear.kernel.get_value()
    if isinstance(kernel, PackedTensor):
        linear.kernel = nnx.Param(at_runtime(kernel))


def _fuse(unit: Unit, fusion: Fusion) -> None:
    """Puts one linear in the place of several, where their kernels can lie side by side."""
    linears = [linear for path in fusion.linears if isinstance(linear := unit.linears()[path], Linear)]
    leaves = [linear.kernel.get_value() for linear in linears]
    kernels = [leaf.kernel for leaf in leaves if isinstance(leaf, RuntimeTensor)]
    biases = [linear.bias.get_value() for linear in linears if linear.bias is not None]
    if len(kernels) < len(linears) or len(biases) not in (0, len(linears)) or obstacle(kernels):
        return
    one = linears[0]
    one.kernel = nnx.Param(RuntimeTensor(kernel=fuse(kernels)))
    if biases:
        one.bias = nnx.Param(jnp.concatenate([jnp.asarray(bias) for bias in biases]))
    for path in fusion.linears:
        parent, name = _place(unit, path)
        delattr(parent, name)
    parent, name = _place(unit, fusion.name)
    setattr(parent, name, nnx.data(Fused(one, tuple(kernel.layout.n for kernel in kernels))))


def _place(unit: Unit, path: str) -> tuple[nnx.Module, str]:
    """The module that holds a path's last part as an attribute, and that part."""
    before, _, name = path.rpartition(".")
    return submodule(unit, before), name

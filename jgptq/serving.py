"""A quantized decoder made ready to be served: kernels in the layout that GPU kernels read."""

import jax
from flax import nnx

from jgptq.errors import ConfigError
from jgptq.hostmem import to_device
from jgptq.models import Decoder
from jgptq.models.layers import Linear
from jgptq.packed import PackedTensor, at_runtime


def for_serving(params: Decoder) -> Decoder:
    """Converts every packed kernel of 4 and 8 bits to the runtime layout, once; other leaves are moved to the device.

    The result computes what `params` does, on a GPU with kernels that read packed codes. It is not what files hold: save
    `params`.

    Args:
      params: a quantized decoder.

    Returns:
      The decoder to serve.

    Raises:
      ConfigError: the decoder is not quantized.
    """
    if params.quantization is None:
        raise ConfigError("the decoder is not quantized, so there is nothing to convert; see jgptq.quantize")
    decoder = jax.tree.map(lambda leaf: leaf, params)
    linears = [linear for block in decoder.layers for stage in block.stages() for linear in stage.linears]
    linears += [] if decoder.lm_head is None else [decoder.lm_head]
    for linear in linears:
        _convert(linear)
    return to_device(decoder)


def _convert(linear: Linear) -> None:
    kernel = linear.kernel.get_value()
    if isinstance(kernel, PackedTensor):
        linear.kernel = nnx.Param(at_runtime(kernel))

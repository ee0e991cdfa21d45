"""The small layers that a decoder is built of. A leaf may be a device array, a host array or a view of a mapped file."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jgptq.models.architecture.config import ModelConfig
from jgptq.models.packed import PackedTensor, RuntimeTensor
from jgptq.notation import Float, Int


class Linear(nnx.Module):
    """`y = h @ kernel + bias`, where the kernel is a float `[K, N]` array, or packed.

    Args:
      k: in-features.
      n: out-features.
      use_bias: whether there is a bias `[N]`.
      rngs: source of the initial kernel, normal with standard deviation 0.02.
    """

    def __init__(self, k: int, n: int, *, use_bias: bool = False, rngs: nnx.Rngs):
        self.kernel: nnx.Param = nnx.Param(jax.random.normal(rngs.params(), (k, n), jnp.float32) * 0.02)
        self.bias = nnx.Param(jnp.zeros((n,), jnp.float32)) if use_bias else None

    def __call__(self, h: Float[jax.Array, "*batch K"]) -> Float[jax.Array, "*batch N"]:
        """`h @ kernel + bias`, in the dtype of `h`."""
        kernel = self.kernel.get_value()
        if isinstance(kernel, PackedTensor | RuntimeTensor):
            y = kernel.matmul(h)
        else:
            y = jnp.matmul(h, jnp.asarray(kernel, h.dtype), preferred_element_type=jnp.float32).astype(h.dtype)
        if self.bias is None:
            return y
        return y + _along_last(self.bias, h.dtype, y.ndim)


class Fused(nnx.Module):
    """Linears that read the same activations, as one whose outputs are theirs side by side: one product where there were several.

    Args:
      linear: the one, `[K, sum of widths]`.
      widths: out-features of each.
    """

    def __init__(self, linear: Linear, widths: tuple[int, ...]):
        self.linear = linear
        self.widths = widths

    def __call__(self, h: Float[jax.Array, "*batch K"]) -> list[jax.Array]:
        """What each linear gives, `[*batch, N]`."""
        return split_features(self.linear(h), self.widths)


def split_features(y: Float[jax.Array, "*batch N"], widths: Sequence[int]) -> list[jax.Array]:
    """Parts of these widths that lie side by side along the last axis."""
    return jnp.split(y, list(itertools.accumulate(widths[:-1])), axis=-1)


class RMSNorm(nnx.Module):
    """`(offset + scale) * h / sqrt(mean(h^2) + eps)`, the mean in float32 (arXiv 1910.07467).

    Args:
      shape: of the scale: D, the size of the last axis, or sizes of the last axes where heads have scales of their own.
      eps: added to the mean square.
      offset: added to the stored scale: 0, or 1 where files hold the scale's distance from one.
    """

    def __init__(self, shape: int | tuple[int, ...], eps: float, offset: float = 0.0):
        self.scale = nnx.Param(jnp.full(shape, 1.0 - offset, jnp.float32))
        self.eps = eps
        self.offset = offset

    def __call__(self, h: Float[jax.Array, "*batch D"]) -> Float[jax.Array, "*batch D"]:
        """The normed activations, in their own dtype."""
        wide = h.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        if self.offset:  # then the reference models multiply in float32, and otherwise in the dtype of `h`
            return (normed * _along_last(self.scale, jnp.float32, h.ndim, self.offset)).astype(h.dtype)
        return normed.astype(h.dtype) * _along_last(self.scale, h.dtype, h.ndim)


class LayerNorm(nnx.Module):
    """`(offset + scale) * (h - mean(h)) / sqrt(var(h) + eps) + bias`, in float32 (arXiv 1607.06450).

    Args:
      shape: of the scale: D, the size of the last axis, or sizes of the last axes where heads have scales of their own.
      eps: added to the variance.
      offset: added to the stored scale: 0, or 1 where files hold the scale's distance from one.
      affine: whether there is a scale; without one there is no bias.
      use_bias: whether there is a bias.
    """

    def __init__(
        self, shape: int | tuple[int, ...], eps: float, offset: float = 0.0, *, affine: bool = True, use_bias: bool = True
    ):
        self.scale = nnx.Param(jnp.full(shape, 1.0 - offset, jnp.float32)) if affine else None
        self.bias = nnx.Param(jnp.zeros(shape, jnp.float32)) if affine and use_bias else None
        self.eps = eps
        self.offset = offset

    def __call__(self, h: Float[jax.Array, "*batch D"]) -> Float[jax.Array, "*batch D"]:
        """The normed activations, in their own dtype."""
        wide = h.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        if self.scale is not None:
            normed = normed * _along_last(self.scale, jnp.float32, h.ndim, self.offset)
        if self.bias is not None:
            normed = normed + _along_last(self.bias, jnp.float32, h.ndim)
        return normed.astype(h.dtype)


Norm = RMSNorm | LayerNorm


def make_norm(config: ModelConfig, shape: int | tuple[int, ...] | None = None) -> Norm:
    """A norm of the decoder's kind.

    Args:
      config: the decoder's switches.
      shape: of its scale; None for that of the residual stream.
    """
    shape = config.hidden_size if shape is None else shape
    if config.norm == "layer":
        switches = {"affine": config.norm_affine, "use_bias": config.norm_bias}
        return LayerNorm(shape, config.norm_eps, config.norm_offset, **switches)
    return RMSNorm(shape, config.norm_eps, config.norm_offset)


def _along_last(param: nnx.Param, dtype: jnp.dtype, ndim: int, offset: float = 0.0) -> jax.Array:
    """A parameter in a dtype, shaped to broadcast along the last of `ndim` axes."""
    array = jnp.asarray(param.get_value(), dtype)
    return (array + jnp.asarray(offset, dtype) if offset else array).reshape((1,) * (ndim - array.ndim) + array.shape)


def softcapped(x: Float[jax.Array, "*batch"], cap: float | None) -> Float[jax.Array, "*batch"]:
    """`cap tanh(x / cap)`, between -cap and cap (arXiv 2408.00118, section 2); x where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


class Embedding(nnx.Module):
    """A table `[V, D]` of token vectors.

    Args:
      vocab_size: V.
      width: D.
      rngs: source of the initial table, normal with standard deviation 0.02.
    """

    def __init__(self, vocab_size: int, width: int, *, rngs: nnx.Rngs):
        self.embedding: nnx.Param = nnx.Param(jax.random.normal(rngs.params(), (vocab_size, width), jnp.float32) * 0.02)

    def __call__(self, tokens: Int[jax.Array, "b S"], dtype: jnp.dtype) -> Float[jax.Array, "b S D"]:
        """The vectors of tokens, in a dtype."""
        return jnp.asarray(self.embedding.get_value())[tokens].astype(dtype)

    def attend(self, h: Float[jax.Array, "b S D"]) -> Float[jax.Array, "b S V"]:
        """Float32 logits with the transposed table: a tied output projection."""
        return jnp.matmul(h, jnp.asarray(self.embedding.get_value(), h.dtype).T, preferred_element_type=jnp.float32)

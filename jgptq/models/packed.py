"""The packed tensor: codes, scales, zero points and group index of one quantized kernel."""

import dataclasses

import jax
import jax.numpy as jnp

from jgptq.errors import CheckpointError
from jgptq.notation import Array, Float, Int
from jgptq.settings.sizes import BITS, ROW_MULTIPLE, group_rows, packable
from pallas_kernels import RuntimeKernel, dequantize_runtime, int4_matmul, int4_matmul_runtime, to_runtime
from pallas_kernels.int4_matmul.reference import dequantize
from pallas_kernels.int4_matmul.runtime import BITS as RUNTIME_BITS
from pallas_kernels.packing import pack_codes, unpack_codes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedTensor:
    """A `[K, N]` kernel of integer codes with a scale and a zero point per group of rows.

    The invariant, for every row k and column n, with g(k) = group_index[k], or k // group_size where `group_index` is None:

        w[k, n] == scales[g(k), n] * (code[k, n] - zero[g(k), n])

    `code` is `qweight` unpacked along K; `zero` is `zeros` unpacked along N, or 2^(bits-1) where `zeros` is None. The layout of
    `qweight` is that of the GPTQ file formats (`pallas_kernels.packing`).
    """

    qweight: Array  # int32 [K*bits/32, N]
    scales: Array  # float16 or bfloat16 [G, N]
    zeros: Array | None = None  # int32 [G, N*bits/32], None for a symmetric grid
    group_index: Array | None = None  # int32 [K], the group of each row; None for contiguous groups
    bits: int = dataclasses.field(metadata={"static": True})
    group_size: int = dataclasses.field(metadata={"static": True})  # rows in a group, or -1 for all
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})  # (K, N)

    def with_scales(self, scales: Array) -> "PackedTensor":
        """The same codes on other scales."""
        return dataclasses.replace(self, scales=scales)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, on a device or in a file."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def dequantize(self) -> Float[jax.Array, "K N"]:
        """The float32 `[K, N]` kernel of the invariant, exact."""
        rows = group_rows(self.shape[0], self.group_size)
        zeros, group_index = _optional(self.zeros), _optional(self.group_index)
        qweight, scales = jnp.asarray(self.qweight), jnp.asarray(self.scales)
        return dequantize(qweight, scales, zeros, bits=self.bits, group_size=rows, group_index=group_index)

    def matmul(self, x: Float[jax.Array, "*batch K"]) -> Float[jax.Array, "*batch N"]:
        """`x @ dequantize()` in the dtype of `x`."""
        rows = group_rows(self.shape[0], self.group_size)
        zeros, group_index = _optional(self.zeros), _optional(self.group_index)
        qweight, scales = jnp.asarray(self.qweight), jnp.asarray(self.scales)
        return int4_matmul(x, qweight, scales, zeros, bits=self.bits, group_size=rows, group_index=group_index)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeTensor:
    """A packed kernel as the GPU kernels read it (`pallas_kernels.int4_matmul.planes`): made once from a `PackedTensor`, never
    saved."""

    kernel: RuntimeKernel

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        return self.kernel.layout.k, self.kernel.layout.n

    def dequantize(self) -> Float[jax.Array, "K N"]:
        """The float32 `[K, N]` kernel, rows as in the file."""
        return dequantize_runtime(self.kernel)

    def matmul(self, x: Float[jax.Array, "*batch K"]) -> Float[jax.Array, "*batch N"]:
        """`x @ dequantize()` in the dtype of `x`: by the kernels on a GPU, in plain JAX elsewhere."""
        return int4_matmul_runtime(x, self.kernel)


def at_runtime(packed: PackedTensor) -> PackedTensor | RuntimeTensor:
    """The kernel in the runtime layout; as it is where that does not hold its width, or groups of unequal sizes."""
    if packed.bits not in RUNTIME_BITS:
        return packed
    rows = group_rows(packed.shape[0], packed.group_size)
    group_index = _optional(packed.group_index)
    if group_index is not None and not bool(jnp.all(jnp.bincount(group_index, length=packed.shape[0] // rows) == rows)):
        return packed
    arrays = (jnp.asarray(packed.qweight), jnp.asarray(packed.scales), _optional(packed.zeros), group_index)
    return RuntimeTensor(kernel=to_runtime(*arrays, group_size=rows, bits=packed.bits))


def _optional(array: Array | None) -> jax.Array | None:
    return None if array is None else jnp.asarray(array)


def pack(
    codes_kn: Int[jax.Array, "K N"],
    scale_gn: Float[jax.Array, "G N"],
    zero_gn: Int[jax.Array, "G N"] | None = None,
    group_k: Int[jax.Array, " K"] | None = None,
    *,
    bits: int,
    group_size: int,
) -> PackedTensor:
    """Packs codes.

    Args:
      codes_kn: unsigned codes `[K, N]`, K and N multiples of 32.
      scale_gn: float16 or bfloat16 scales `[G, N]`.
      zero_gn: integer zero points `[G, N]`; None for a symmetric grid.
      group_k: int32 group of each row `[K]`; None where groups are contiguous.
      bits: width of a code.
      group_size: rows in a group, or -1 for all of K.

    Returns:
      The tensor whose `dequantize` gives `scale * (code - zero)`.
    """
    zeros = None if zero_gn is None else pack_codes(zero_gn.T, bits).T
    return PackedTensor(
        qweight=pack_codes(codes_kn, bits),
        scales=scale_gn,
        zeros=zeros,
        group_index=group_k,
        bits=bits,
        group_size=group_size,
        shape=(codes_kn.shape[0], codes_kn.shape[1]),
    )


def unpack(packed: PackedTensor) -> tuple[Int[jax.Array, "K N"], Int[jax.Array, "G N"]]:
    """The codes `[K, N]` and zero points `[G, N]` of a packed tensor, int32; the inverse of `pack`."""
    codes_kn = unpack_codes(jnp.asarray(packed.qweight), packed.bits)
    if packed.zeros is None:
        zero_gn = jnp.full(packed.scales.shape, 2 ** (packed.bits - 1), jnp.int32)
    else:
        zero_gn = unpack_codes(jnp.asarray(packed.zeros).T, packed.bits).T
    return codes_kn, zero_gn


def validate(packed: PackedTensor, name: str) -> None:
    """Checks the parts of a packed tensor against each other.

    Args:
      packed: the tensor.
      name: what to call it in the error.

    Raises:
      CheckpointError: a width, shape or dtype that contradicts the others; all contradictions at once.
    """
    k, n = packed.shape
    rows = group_rows(k, packed.group_size)
    groups = -(-k // rows)
    problems = []
    if packed.bits not in BITS:
        problems.append(f"bits must be one of {BITS}, found {packed.bits}")
    if reason := packable(k, n):
        problems.append(reason)
    if packed.group_size != -1 and (packed.group_size <= 0 or packed.group_size % ROW_MULTIPLE):
        problems.append(f"group size must be -1 or a multiple of {ROW_MULTIPLE}, found {packed.group_size}")
    expected: dict[str, tuple[Array | None, tuple[int, ...], tuple[str, ...]]] = {
        "qweight": (packed.qweight, (k * packed.bits // 32, n), ("int32",)),
        "scales": (packed.scales, (groups, n), ("float16", "bfloat16", "float32")),
        "zeros": (packed.zeros, (groups, n * packed.bits // 32), ("int32",)),
        "group_index": (packed.group_index, (k,), ("int32",)),
    }
    for part, (array, shape, dtypes) in expected.items():
        if array is not None and (tuple(array.shape) != shape or str(array.dtype) not in dtypes):
            problems.append(f"{part} must be {' or '.join(dtypes)} {list(shape)}, found {array.dtype} {list(array.shape)}")
    if problems:
        raise CheckpointError(f"{name}: " + "; ".join(problems))

"""Orbax checkpoints: of a decoder trained in JAX, and as a format of this project's own.

The tree is that of `flax.nnx.to_pure_dict(nnx.state(decoder))`: nested dicts along the decoder's paths. A packed kernel is a dict
of its parts `qweight`, `scales`, `zeros` and `group_index`, those that it has. Kernels of experts are written one by
one, and read so or as the stacks `[E, K, N]` that the decoder has. A folder of format `orbax` holds the tree under `orbax/`, and
next to it config.json, whose `quantization_config` has bits and group size of each packed kernel.
"""

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from converters.formats.settings import meta_of, own_settings, settings_from
from converters.names import leaves
from converters.output.describe import config_json, copy_companions, kernels_of, write_card, write_report
from converters.output.folders import ORBAX, PartialFolder
from converters.reading.json_file import read_json
from jgptq.errors import CheckpointError, OutputError
from jgptq.models import Decoder, ExpertLinear, ModelConfig, Origin, config_from_hf, single_linears
from jgptq.models.packed import PackedTensor, validate
from jgptq.run.report import Report

PARTS = ("qweight", "scales", "zeros", "group_index")
SERVING = """`converters.load_hf(folder)` gives a Flax decoder. Other programs read no orbax checkpoints; `jgptq convert`
writes their formats."""


def save_orbax(params: Decoder, out: Path, *, report: Report | None = None) -> Path:
    """Writes a decoder, packed or float, as a folder of format `orbax`; `converters.load_hf` reads it.

    Args:
      params: the decoder.
      out: the folder to make.
      report: of the run that made the decoder.

    Raises:
      OutputError: the disk is full.
    """
    import orbax.checkpoint as ocp

    tree = _tree_of(params)
    folder = PartialFolder(out, needed=sum(array.nbytes for array in jax.tree.leaves(tree)))
    folder.make(clear=True)
    try:
        folder.guard(ORBAX, folder.check_space)
    except OutputError:
        shutil.rmtree(folder.folder)  # nothing is in it yet
        raise
    with ocp.PyTreeCheckpointer() as checkpointer:
        folder.guard(ORBAX, lambda: checkpointer.save((folder.folder / ORBAX).resolve(), tree))
    hf = config_json(params)
    if params.quantization is not None:
        hf["quantization_config"] = {
            "quant_method": ORBAX,
            "meta": meta_of(params.quantization) | own_settings(params.quantization),
            "kernels": {
                path: {"bits": kernel.bits, "group_size": kernel.group_size}
                for path, kernel in kernels_of(params)
                if isinstance(kernel, PackedTensor)
            },
        }
        write_card(folder, params, ORBAX, SERVING, report)
    write_report(folder, report)
    folder.write_text("config.json", json.dumps(hf, indent=2) + "\n")
    copy_companions(folder, params)
    return folder.finish()


def load_orbax(path: str | Path, config: ModelConfig | str | Path, *, key: str = "", dtype: str = "auto") -> Decoder:
    """Reads a float decoder from an orbax checkpoint of its NNX state, such as a training run in JAX saves.

    Args:
      path: the checkpoint: `nnx.state(decoder)`, or `nnx.to_pure_dict` of it, as `StandardCheckpointer` writes it.
      config: the decoder's switches; or a folder with config.json, whose tokenizer then belongs to the decoder.
      key: where in the tree the decoder's state is, with dots, such as "model"; by default the whole tree.
      dtype: what activations are computed in, as for `load_hf`; read only where `config` is a folder.

    Raises:
      CheckpointError: no orbax checkpoint; arrays that are missing, unexpected or of a wrong shape, all at once.

    Example:
      >>> params = load_orbax("run/step_1000", "folder_of_the_float_model", key="model")  # doctest: +SKIP
    """
    origin = None
    if not isinstance(config, ModelConfig):
        hf = read_json(Path(config) / "config.json")
        hf.pop("quantization_config", None)
        origin, config = Origin(folder=str(config), hf_config=json.dumps(hf)), config_from_hf(hf, dtype)
    decoder = _decoder_of(Path(path), _restore(Path(path), key), config, {})
    decoder.origin = origin
    return decoder


def load_orbax_folder(folder: Path, dtype: str) -> Decoder:
    """Reads a folder of format `orbax`; `converters.load_hf` calls this.

    Raises:
      CheckpointError: as `load_orbax`, or settings that cannot be read.
    """
    hf = read_json(folder / "config.json")
    quantization = hf.pop("quantization_config", None)
    kernels = {} if quantization is None else quantization.get("kernels", {})
    decoder = _decoder_of(folder / ORBAX, _restore(folder / ORBAX, ""), config_from_hf(hf, dtype), kernels)
    decoder.origin = Origin(folder=str(folder), hf_config=json.dumps(hf))
    decoder.quantization = None if quantization is None else settings_from(quantization.get("meta") or {})
    return decoder


def _tree_of(params: Decoder) -> dict[str, Any]:
    """The leaves of a decoder as nested dicts of numpy arrays."""
    tree: dict[str, Any] = {}
    for path, module, attribute in leaves(params):
        leaf = getattr(module, attribute).get_value()
        node = tree
        for part in path.split("."):
            node = node.setdefault(part, {})
        if isinstance(leaf, PackedTensor):
            parts = {part: getattr(leaf, part) for part in PARTS}
            node[attribute] = {part: np.ascontiguousarray(array) for part, array in parts.items() if array is not None}
        else:
            node[attribute] = np.ascontiguousarray(leaf)
    return tree


def _restore(path: Path, key: str) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint, or of a part of it, by dotted path."""
    import orbax.checkpoint as ocp

    if not (path / "_METADATA").is_file():
        raise CheckpointError(
            f"{path}: no orbax checkpoint; expected a folder with _METADATA, as StandardCheckpointer writes, such as "
            "run/1000/default of a CheckpointManager"
        )
    within = [part for part in key.split(".") if part]
    try:
        with ocp.PyTreeCheckpointer() as checkpointer, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sharding info not provided")  # arrays go to host memory, unsharded
            stored = checkpointer.metadata(path.resolve()).item_metadata
            if stored is None:
                raise ValueError("no list of arrays")
            item = _only(stored.tree, within, path)
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            wanted = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
            restored = checkpointer.restore(path.resolve(), args=wanted)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: the orbax checkpoint is damaged ({error}); fetch or save it again") from error
    for part in within:
        restored = restored[part]
    return {_dotted(keys): array for keys, array in jax.tree_util.tree_flatten_with_path(restored)[0]}


def _only(tree: Any, within: Sequence[str], path: Path) -> Any:
    """A tree that holds nothing but what is at a path of keys."""
    if not within:
        return tree
    first, *rest = within
    if not isinstance(tree, Mapping) or first not in tree:
        there = ", ".join(sorted(map(str, tree))) if isinstance(tree, Mapping) else "an array"
        raise CheckpointError(f"{path}: nothing at key {first!r}, there is {there}")
    return {first: _only(tree[first], rest, path)}


def _dotted(keys: tuple[Any, ...]) -> str:
    """The path of an array in the decoder; the state of an NNX variable is stored under a last key `value`."""
    parts = [str(getattr(key, "key", getattr(key, "idx", key))) for key in keys]
    return ".".join(part for part in parts if part != "value")


def _with_single_experts(arrays: dict[str, np.ndarray], decoder: Decoder) -> dict[str, np.ndarray]:
    """The arrays with every stack `[E, K, N]` replaced by the kernel of each expert."""
    single = dict(arrays)
    for index, block in enumerate(decoder.layers):
        for path, linear in block.linears().items():
            name = f"layers.{index}.{path}.kernel"
            if isinstance(linear, ExpertLinear) and name in arrays and len(arrays[name]) == linear.experts:
                names = [f"layers.{index}.{one}.kernel" for one, _ in single_linears(path, linear)]
                single |= dict(zip(names, single.pop(name), strict=True))
    return single


def _decoder_of(
    path: Path, arrays: dict[str, np.ndarray], config: ModelConfig, kernels: Mapping[str, Mapping[str, int]]
) -> Decoder:
    """A decoder with these leaves; all problems in one error."""
    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    problems: list[str] = []
    arrays = _with_single_experts(arrays, decoder)
    for where, module, attribute in leaves(decoder):
        shape, name = tuple(getattr(module, attribute).get_value().shape), f"{where}.{attribute}"
        parts = {part: arrays.pop(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in arrays}
        array = arrays.pop(name, None)
        if parts and where in kernels:
            leaf = PackedTensor(**parts, **kernels[where], shape=shape)  # type: ignore[arg-type]
            try:
                validate(leaf, name)
            except CheckpointError as error:
                problems.append(f"  {error}")
            setattr(module, attribute, nnx.Param(leaf))
        elif array is None:
            problems.append(f"  {name} is missing, expected {list(shape)}")
        elif array.shape != shape or not jax.numpy.issubdtype(array.dtype, jax.numpy.floating):
            problems.append(f"  {name} is {array.dtype} {list(array.shape)}, expected a float {list(shape)}")
        else:
            setattr(module, attribute, nnx.Param(array))
    problems += [f"  {name} is not in a {config.model_type} of this config" for name in sorted(arrays)]
    if problems:
        raise CheckpointError(f"{path}: {len(problems)} arrays do not fit the config:\n" + "\n".join(problems[:40]))
    return decoder

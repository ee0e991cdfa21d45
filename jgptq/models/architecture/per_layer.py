"""Windows and rotary settings of the blocks of a decoder <-> the keys of a `config.json`, by the rules of its family.

The blocks that rotate queries and keys are, by `Family.rotated`, one of

    all             every block
    listed          those with a 1 in `no_rope_layers`, or else all but every `no_rope_layer_interval`-th
    sliding         those with a window; where these have a base wavelength of their own, the others are rotated too
    sliding_or_all  those with a window, or every block where the file has no width for one
"""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from jgptq.errors import ArchitectureError, CheckpointError
from jgptq.models.architecture.config import AlibiPositions, LearnedPositions, ModelConfig, Positions
from jgptq.models.architecture.row import Family, Key, Window
from jgptq.models.rotary import RopeConfig

_SLIDING, _FULL = "sliding_attention", "full_attention"
_OPT_IN = ("opt_in", "opt_in_all", "opt_in_even")


def read_windows(hf: Mapping[str, Any], known: Window | None, layers: int) -> tuple[int | None, ...]:
    """The attention window of each block.

    Raises:
      ArchitectureError: `layer_types` has another length, or other entries than the two that are known.
      CheckpointError: a window of no positions.
    """
    window = None if known is None else hf.get("sliding_window", known.default)
    if known is None or window is None or (known.blocks in _OPT_IN and not hf.get("use_sliding_window", False)):
        return (None,) * layers
    if window == 0:
        raise CheckpointError("config.json: sliding_window: expected a whole number above 0 or null, found 0")
    if known.blocks in ("all", "opt_in_all"):
        return (window,) * layers
    types = hf.get("layer_types")
    if types is None:
        types = [_SLIDING if slides else _FULL for slides in _slides(hf, known, layers)]
    if set(types) - {_SLIDING, _FULL} or len(types) != layers:
        raise ArchitectureError(f"config.json: layer_types must be {layers} of {_FULL}, {_SLIDING}; found {reprlib.repr(types)}")
    return tuple(window if kind == _SLIDING else None for kind in types)


def _slides(hf: Mapping[str, Any], known: Window, layers: int) -> list[bool]:
    """Which blocks have a window, where there are no `layer_types`."""
    bound = hf.get("max_window_layers", 28)
    if known.blocks == "opt_in":
        return [index >= bound for index in range(layers)]
    if known.blocks == "opt_in_even":
        return [index % 2 == 0 and index < bound for index in range(layers)]
    if known.blocks == "unrotated":
        return [hf.get("use_sliding_window", False) and not rotates for rotates in _listed(hf, layers)]
    period = known.period if known.period_key is None else hf.get(known.period_key, known.period)
    if isinstance(period, str) or period == 0:
        raise ArchitectureError(f"config.json: expected layer_types, or a number as {known.period_key}; found {period!r}")
    return [period is None or (index + 1) % period != 0 for index in range(layers)]


def windows_to_hf(windows: Sequence[int | None], known: Window | None) -> dict[str, Any]:
    """The keys that `read_windows` reads."""
    if known is None:
        return {}
    width = max((window for window in windows if window is not None), default=None)
    if known.blocks == "all":
        return {"sliding_window": width}
    if known.blocks == "opt_in_all":
        return {"sliding_window": width, "use_sliding_window": width is not None}
    types = {"layer_types": [_FULL if window is None else _SLIDING for window in windows]}
    if known.blocks == "patterned":  # a width that no block reads has to be there: null would say more than the types do
        return {"sliding_window": known.default if width is None else width, **types}
    opted = {"sliding_window": width, "use_sliding_window": width is not None, **types}
    return opted | ({"max_window_layers": sum(window is None for window in windows)} if known.blocks in _OPT_IN else {})


def read_positions(hf: Mapping[str, Any], family: Family, head_dim: int) -> Positions:
    """How positions reach the attention, where all blocks agree; else, in the blocks without a window.

    Raises:
      CheckpointError: more features are rotated than a head has, or rotary settings that have no frequencies.
    """
    kind = family.positions.read(family.positions.given(hf)) if isinstance(family.positions, Key) else family.positions
    most = family.max_positions if hf.get(family.positions_key) is None else hf[family.positions_key]
    if kind == "learned":
        return LearnedPositions(max_position_embeddings=most, offset=family.position_offset)
    if kind == "alibi":
        return AlibiPositions(max_position_embeddings=most, **family.alibi)
    if family.rotary_dim is not None:
        features = hf.get(family.rotary_dim.name, family.rotary_dim.default) or head_dim
        if features > head_dim:
            raise CheckpointError(f"config.json: {family.rotary_dim.name} {features} is more than a head has, {head_dim}")
        return RopeConfig.from_hf({"partial_rotary_factor": features / head_dim, "max_position_embeddings": most}, head_dim, 1.0)
    given = {key: value for key, value in hf.items() if value is not None}
    settings = dict(family.rotary_defaults) | given | _renamed(given, family)
    settings["max_position_embeddings"] = most
    if family.local_theta is not None:
        shared = settings.pop("rope_parameters", {}).get(_FULL) or {}
        settings["rope_scaling"] = {**shared, **settings.get("rope_scaling", {})}
    return RopeConfig.from_hf(settings, head_dim, family.partial_rotary)


def _renamed(hf: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The rotary settings that a family's files have under names of their own, by the usual names."""
    renamed = {usual: hf[name] for name, usual in family.rotary_keys.items() if name in hf}
    for form in ("rope_scaling", "rope_parameters"):
        if given := hf.get(form):
            types = {key: family.rope_types.get(given[key], given[key]) for key in ("rope_type", "type") if key in given}
            renamed[form] = given | types
    return renamed


def read_ropes(
    hf: Mapping[str, Any], family: Family, positions: Positions, windows: Sequence[int | None], head_dim: int
) -> tuple[RopeConfig | None, ...] | None:
    """The rotary settings of each block; None where all have those of `positions`.

    Raises:
      ArchitectureError: the settings depend on which blocks have a window, and the file has no width for it.
      CheckpointError: `no_rope_layers` is too short.
    """
    if family.rotated == "all" or not isinstance(positions, RopeConfig):
        return None
    if family.rotated == "listed":
        ropes = tuple(positions if rotates else None for rotates in _listed(hf, len(windows)))
    else:
        if family.window is not None and hf.get("sliding_window", family.window.default) is None:
            if family.rotated == "sliding_or_all":
                return None
            raise ArchitectureError("config.json: expected a number as sliding_window, which says what is rotated; found null")
        local = family.local_theta
        with_window, without = (positions, None) if local is None else (_local(hf, local, positions, head_dim), positions)
        ropes = tuple(without if window is None else with_window for window in windows)
    return None if all(rope == positions for rope in ropes) else ropes


def _local(hf: Mapping[str, Any], theta: Key, positions: RopeConfig, head_dim: int) -> RopeConfig:
    """The rotary settings of blocks with a window: never scaled by `rope_scaling`, which speaks of the others."""
    settings = {
        "max_position_embeddings": positions.max_position_embeddings,
        "rope_theta": theta.default if hf.get(theta.name) is None else hf[theta.name],
        "rope_parameters": (hf.get("rope_parameters") or {}).get(_SLIDING),
    }
    return RopeConfig.from_hf(settings, head_dim)


def _listed(hf: Mapping[str, Any], layers: int) -> list[bool]:
    """Which blocks rotate queries and keys, where a file lists them."""
    listed = hf.get("no_rope_layers")
    if listed is None:
        return [(index + 1) % hf.get("no_rope_layer_interval", 4) != 0 for index in range(layers)]
    if len(listed) < layers:
        raise CheckpointError(f"config.json: no_rope_layers needs an entry for each of {layers} blocks, found {len(listed)}")
    return [bool(rotates) for rotates in listed[:layers]]


def positions_to_hf(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The keys that `read_positions` and `read_ropes` read."""
    hf: dict[str, Any] = {family.positions_key: config.positions.max_position_embeddings}
    if isinstance(family.positions, Key):
        kind = "alibi" if isinstance(config.positions, AlibiPositions) else "rotary"
        hf[family.positions.name] = family.positions.stored(kind)
    if not isinstance(config.positions, RopeConfig):
        return hf
    if family.rotary_dim is not None:
        return hf | {family.rotary_dim.name: config.positions.rotated(config.head_dim)}
    hf |= {"rope_parameters": config.positions.to_hf(), "rope_theta": config.positions.rope_theta}
    hf |= {key: value for key in family.rotary_defaults if (value := getattr(config.positions, key)) is not None}
    if family.rotated == "listed":
        hf["no_rope_layers"] = [int(layer.rope is not None) for layer in config.layers]
    if family.rotated == "sliding_or_all" and config.layer_ropes is None and set(config.layer_windows) == {None}:
        hf["sliding_window"] = None
    if family.local_theta is not None:
        local = next((layer.rope for layer in config.layers if layer.window is not None), None)
        hf["rope_parameters"] = {_FULL: config.positions.to_hf()}
        if local is not None:
            hf["rope_parameters"][_SLIDING] = local.to_hf()
            hf[family.local_theta.name] = local.rope_theta
    return hf

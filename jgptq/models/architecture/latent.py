"""Switches of latent attention."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Attention whose keys and values come from one narrow vector a token (MLA, arXiv 2405.04434).

    A head has `plain` features without positions and `ModelConfig.head_dim` with rotary ones; the keys of the latter are shared
    by all heads.
    """

    query_rank: int | None  # width of the vector that queries come from; None: they come from the stream itself
    kv_rank: int  # width of the vector that keys and values come from
    plain: int  # features of a head's queries and keys that have no position
    value: int  # features of a head's values

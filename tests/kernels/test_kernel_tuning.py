"""How products are cut up: the rule and the candidates fit every shape, and the table wins where it has an entry."""

import json
from importlib.resources import files

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.int4_matmul import tuning
from pallas_kernels.int4_matmul.planes import Planes
from pallas_kernels.int4_matmul.shapes import SHAPES, shapes_of
from pallas_kernels.int4_matmul.triton import Tiling
from pallas_kernels.int4_matmul.tuning import BUCKETS, bucket_of, candidates, key_of, neighbours, rule, tiling_of

SIZES = ((32, 8, 32), (4096, 4096, 128), (14336, 4096, 32), (11008, 4096, 128), (160, 1000, 160), (896, 4864, 64))


def fits(tiling: Tiling, layout: Planes) -> bool:
    return layout.padded_n % tiling.block_n == 0 and layout.tiles % tiling.split_k == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_rule_and_the_candidates_fit_every_shape(bits, dtype):
    for k, n, group_size in SIZES:
        layout = Planes(k=k, n=n, bits=bits, group_size=group_size)
        for m in range(1, BUCKETS[-1] + 1):
            assert fits(rule(m, layout, dtype), layout), (m, layout)
        for m in BUCKETS:
            tried = candidates(m, layout, dtype)
            assert tried
            assert all(fits(tiling, layout) for tiling in tried)
            if dtype == jnp.float32:
                assert all(tiling.form != "swapped" for tiling in tried)


def test_more_rows_than_the_last_bucket_are_expanded():
    layout = Planes(k=256, n=64, bits=4, group_size=64)
    assert bucket_of(BUCKETS[-1]) == BUCKETS[-1]
    assert bucket_of(BUCKETS[-1] + 1) is None
    assert tiling_of(BUCKETS[-1] + 1, layout, jnp.bfloat16) is None
    assert candidates(BUCKETS[-1] + 1, layout, jnp.bfloat16) == []
    with pytest.raises(ValueError, match="no kernel takes 257 rows"):
        rule(257, layout, jnp.bfloat16)


def test_an_entry_of_the_table_wins_over_the_rule_for_its_bucket_alone(monkeypatch):
    layout = Planes(k=256, n=64, bits=4, group_size=64)
    entry = Tiling(form="planes", block_m=16, block_n=64, split_k=2, num_warps=8, num_stages=5)
    key = key_of(jax.devices()[0].device_kind, jax.__version__, 12, layout, jnp.bfloat16)
    monkeypatch.setattr(tuning, "table", lambda: {key: entry})
    assert tiling_of(5, layout, jnp.bfloat16) == tiling_of(16, layout, jnp.bfloat16) == entry
    assert tiling_of(17, layout, jnp.bfloat16) == rule(17, layout, jnp.bfloat16) != entry
    assert tiling_of(12, layout, jnp.float16) == rule(12, layout, jnp.float16)


def test_the_committed_table_can_be_read():
    stored = json.loads((files("pallas_kernels.int4_matmul") / "tunings.json").read_text())
    assert set(tuning.table()) == set(stored)


def test_a_short_tuning_tries_the_nearest_tilings_and_not_the_rule_again():
    layout = Planes(k=4096, n=4096, bits=4, group_size=128)
    ruled, tried = rule(64, layout, jnp.bfloat16), neighbours(64, layout, jnp.bfloat16, 10)
    assert len(tried) == len(set(tried)) == 10
    assert ruled not in tried
    differ = [sum(getattr(tiling, name) != value for name, value in vars(ruled).items()) for tiling in tried]
    assert differ == sorted(differ)
    assert differ[0] == 1


def test_every_tiling_of_the_rule_is_compiled_without_a_gpu():
    compiled = shapes_of("compile")
    for group_size, sym, dtype in ((128, True, "bfloat16"), (128, False, "bfloat16"), (32, True, "float16")):
        layout = Planes(k=4096, n=4096, bits=4, group_size=group_size)
        ours = [shape for shape in compiled if (shape.layout, shape.sym, shape.dtype) == (layout, sym, dtype)]
        tilings = {rule(shape.m, layout, jnp.dtype(dtype)) for shape in ours}
        assert tilings == {rule(m, layout, jnp.dtype(dtype)) for m in BUCKETS}


def test_no_shape_is_listed_twice_for_a_use():
    assert all(shape.uses for shape in SHAPES)
    for use in {use for shape in SHAPES for use in shape.uses}:
        names = [str(shape) for shape in shapes_of(use)]
        assert len(names) == len(set(names)), use
    assert set(shapes_of("time_first")) <= set(shapes_of("time"))

"""What the GPU benchmarks measure with, on a CPU."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "gpu"))

import bench_int4_matmul
import tune_int4_matmul
from records import Record, require_gpu
from timing import PASSES, chained, slopes

from pallas_kernels.int4_matmul.shapes import Shape


def test_a_slope_is_the_time_of_a_step_without_what_a_call_costs(monkeypatch):
    import timing

    # A call costs 5 s, and each of two steps a pass 0.25 s.
    clock = {passes: [5.0 + 0.5 * passes, 9.0 + 0.5 * passes] for passes in PASSES}
    monkeypatch.setattr(timing, "seconds", lambda runs, repeats: {key: clock[key[1]] for key in runs})
    slope = slopes({"step": (lambda x, _: x, jnp.ones((1, 1)), [None, None])}, 2)["step"]
    assert slope.seconds == pytest.approx(0.25)
    assert slope.median == pytest.approx(0.25)
    assert slope.wall == pytest.approx(5.5 / 2)


def test_a_chain_depends_on_every_product():
    step = chained(lambda x, w: x @ w)
    x, poison = jnp.ones((2, 4)), jnp.full((4, 3), jnp.nan)
    assert bool(jnp.isfinite(step(x, jnp.ones((4, 3)))).all())
    assert not bool(jnp.isfinite(step(x, poison)).any())
    text = jax.jit(step).lower(x, poison).as_text()
    assert "optimization_barrier" in text


def test_a_wrong_product_is_recorded_and_the_others_still_run(monkeypatch, tmp_path):
    shapes = [Shape(m=2, k=64, n=8, group_size=32, uses=frozenset()), Shape(m=1, k=32, n=8, group_size=32, uses=frozenset())]
    right = bench_int4_matmul.int4_matmul_runtime

    def wrong_for_two_rows(x, kernel, *, backend):
        if x.shape[0] == 2:
            raise RuntimeError("no such instruction")
        return right(x, kernel, backend=backend) * (1 + (kernel.layout.k == 96))

    monkeypatch.setattr(bench_int4_matmul, "int4_matmul_runtime", wrong_for_two_rows)
    monkeypatch.setattr(bench_int4_matmul, "shapes_of", lambda _: shapes)
    record = Record(tmp_path / "record.json")
    assert not bench_int4_matmul.check(record, "triton", True, 0)
    rows = json.loads((tmp_path / "record.json").read_text())["checks"]
    assert [row["right"] for row in rows] == [False, True]
    assert "no such instruction" in rows[0]["error"]
    shapes[0] = Shape(m=1, k=96, n=8, group_size=32, uses=frozenset())
    assert not bench_int4_matmul.check(record, "triton", True, 0), "twice the product is not the product"


def test_figures_of_a_cpu_never_stand_for_those_of_a_gpu():
    require_gpu(rehearse=True)
    with pytest.raises(SystemExit, match="expected an NVIDIA GPU, found cpu; try --rehearse"):
        require_gpu(rehearse=False)


def test_only_tilings_that_beat_the_rule_are_adopted(tmp_path):
    table, record = tmp_path / "tunings.json", tmp_path / "gpu.json"
    table.write_text(json.dumps({"kept": {"form": "a"}, "slower now": {"form": "b"}}))
    rows = [
        {"key": "slower now", "gain": 1.01, "best": {"form": "c"}},
        {"key": "new", "gain": 1.2, "best": {"form": "d"}},
        {"shape": "the rule itself failed"},
    ]
    record.write_text(json.dumps({"entries": {"tune": {"result": {"tunings": rows}}}}))
    assert tune_int4_matmul.adopt(record, table) == 2
    assert json.loads(table.read_text()) == {"kept": {"form": "a"}, "new": {"form": "d"}}
    record.write_text(json.dumps({"tunings": rows[:1]}))
    assert tune_int4_matmul.adopt(record, table) == 2

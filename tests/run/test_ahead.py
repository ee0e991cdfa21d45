"""Programs that are compiled before they are needed, and the threads of LAPACK."""

import contextlib
import threading
from collections.abc import Callable

import jax
import pytest
import scipy.linalg
import sparse
import threadpoolctl
import tiny
from compiling import compilations

import jgptq
from jgptq.run import driver, stage
from jgptq.run.ahead import Program, compiled_ahead
from jgptq.run.lapack import ONE_THREAD, lapack_threads

SETTINGS = {"group_size": 32, "tune": 0.0}


@pytest.mark.parametrize(
    ("preset", "changes"), [("fast", {}), ("balanced", {}), ("balanced", sparse.QWEN2_MOE)], ids=["fast", "balanced", "experts"]
)
def test_what_is_compiled_ahead_is_what_the_run_needs(preset: str, changes: dict, monkeypatch: pytest.MonkeyPatch):
    params, calib = tiny.decoder(**changes), tiny.tokens()
    jax.clear_caches()
    with compilations() as ahead:
        jgptq.quantize(params, calib, preset=preset, **SETTINGS)
    monkeypatch.setattr(driver, "compiled_ahead", lambda programs: compiled_ahead([]))
    jax.clear_caches()
    with compilations() as when_needed:
        jgptq.quantize(params, calib, preset=preset, **SETTINGS)
    assert sorted(ahead) == sorted(when_needed)


def test_a_run_has_its_solves_compiled_on_the_thread():
    names: set[str] = set()

    def listen(event: str, _seconds: float, **facts: str) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and threading.current_thread().name.startswith("compile"):
            names.add(facts["fun_name"])

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jgptq.quantize(tiny.decoder(), tiny.tokens(), preset="fast", **SETTINGS)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert {"jit(_prepared)", "jit(_solve_tile)", "jit(_advance)"} <= names


def program(build: Callable[[], object]) -> Program:
    return Program("solve", (0, 2), build)


def test_programs_are_compiled_on_another_thread():
    threads: list[str] = []
    done = threading.Event()
    with compiled_ahead([program(lambda: threads.append(threading.current_thread().name)), program(done.set)]):
        assert done.wait(60)
    assert threads != [threading.current_thread().name]


def test_a_program_that_cannot_be_compiled_ahead_stops_nothing():
    done = threading.Event()
    with compiled_ahead([program(lambda: 1 / 0), program(done.set)]) as ahead:
        assert done.wait(60)
        ahead.settle("solve", 0)


def test_programs_that_were_not_begun_are_dropped_at_the_end():
    release, begun = threading.Event(), []
    programs = [program(lambda: release.wait(60)), program(lambda: begun.append(1))]
    with contextlib.suppress(KeyError), compiled_ahead(programs):
        threading.Timer(0.2, release.set).start()
        raise KeyError
    assert begun == []


def test_a_run_that_needs_a_program_waits_for_the_thread_or_takes_it_from_the_queue():
    order: list[str] = []
    started, release = threading.Event(), threading.Event()

    def slow() -> None:
        started.set()
        release.wait(60)
        order.append("compiled")

    with compiled_ahead([Program("solve", (0, 2), slow), Program("move", (1,), lambda: order.append("queued"))]) as ahead:
        assert started.wait(60)
        ahead.settle("move", 1)
        ahead.settle("move", 0)
        assert order == []
        threading.Timer(0.2, release.set).start()
        ahead.settle("solve", 2)
        order.append("needed")
    assert order == ["compiled", "needed"]


def blas_threads() -> set[int]:
    scipy.linalg.cholesky([[1.0]])
    return {library["num_threads"] for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"}


@pytest.mark.parametrize(("k", "wanted"), [(ONE_THREAD, 1), (ONE_THREAD + 1, 2)])
def test_small_hessians_are_factored_on_one_thread(k: int, wanted: int):
    with threadpoolctl.threadpool_limits(limits=2, user_api="blas"):
        with lapack_threads(k):
            assert blas_threads() == {wanted}
        assert blas_threads() == {2}


def test_a_run_limits_the_threads_of_lapack_while_it_factors(monkeypatch: pytest.MonkeyPatch):
    seen: set[int] = set()
    prepare_stage = stage.prepare_stage
    monkeypatch.setattr(
        stage, "prepare_stage", lambda *args, **kwargs: seen.update(blas_threads()) or prepare_stage(*args, **kwargs)
    )
    with threadpoolctl.threadpool_limits(limits=2, user_api="blas"):
        jgptq.quantize(tiny.decoder(), tiny.tokens(), preset="fast", **SETTINGS)
        assert seen == {1}
        assert blas_threads() == {2}

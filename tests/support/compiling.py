"""Which programs are compiled."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The name of each program that is compiled meanwhile."""
    names: list[str] = []

    def listen(event: str, _seconds: float, **facts: str) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(facts["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)

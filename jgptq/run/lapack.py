"""How many threads LAPACK's library may use while a stage is solved.

On a CPU, Hessians are factored by the library that SciPy brings, on threads of its own. They wait for each other by spinning, on
the cores that XLA's threads run on: on two cores that were not idle a factorization of K = 768 took 560 ms on two threads and
4 ms on one. Only for a large K are more threads worth it. The number of threads belongs to the process: runs in several threads
of one process share it.
"""

import contextlib
import functools
from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

ONE_THREAD = 2048
"""The largest K that is factored on one thread."""


def lapack_threads(k: int) -> contextlib.AbstractContextManager[object]:
    """A context in which LAPACK's library uses one thread, if matrices of K rows are small; what it has elsewhere, if not.

    Results that are needed under the limit have to be waited for inside of the context.

    Args:
      k: rows of the matrices that are factored.
    """
    if k > ONE_THREAD or jax.default_backend() != "cpu":
        return contextlib.nullcontext()
    limits: contextlib.AbstractContextManager[object] = _libraries().limit(limits=1, user_api="blas")
    return limits


@functools.cache
def _libraries() -> "ThreadpoolController":
    """The libraries of this process whose threads can be set; to look for them takes milliseconds."""
    import scipy.linalg  # noqa: F401, a library that is not loaded is not listed
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()

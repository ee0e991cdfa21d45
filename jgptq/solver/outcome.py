"""What can happen in a solve, with causes and remedies."""

import enum


class Outcome(enum.IntEnum):
    """What happened in a solve; `message` says it in full."""

    SOLVED = 0
    RAISED_DAMPING = 1
    ROUNDED = 2
    ZERO_HESSIAN = 3
    NOT_FACTORED = 4
    NONFINITE_HESSIAN = 5
    NONFINITE_WEIGHTS = 6
    SCALE_OVERFLOW = 7
    NOT_A_HESSIAN = 8

    @property
    def failed(self) -> bool:
        """Whether the codes must not be used."""
        return self >= Outcome.ZERO_HESSIAN

    @property
    def message(self) -> str:
        """One sentence: the diagnosis, its cause and its remedy."""
        return _MESSAGES[self]


_MESSAGES = {
    Outcome.SOLVED: "Solved at the damping that was asked for.",
    Outcome.RAISED_DAMPING: "Solved only after raising the damping: the tokens span too few directions; calibrate on more.",
    Outcome.ROUNDED: "Rounded to nearest, without error compensation.",
    Outcome.ZERO_HESSIAN: "The Hessian is zero: no token reached it, or all its inputs are zero; calibrate on other text.",
    Outcome.NOT_FACTORED: "No damping makes the Hessian positive definite: the activations overflow; try dtype float32.",
    Outcome.NONFINITE_HESSIAN: "The activations hold NaN or infinity: a layer before overflows; try dtype float32.",
    Outcome.NONFINITE_WEIGHTS: "The weights hold NaN or infinity: the checkpoint is damaged; fetch it again.",
    Outcome.NOT_A_HESSIAN: "The Hessian is not symmetric or its diagonal is negative: it was not summed from activations.",
    Outcome.SCALE_OVERFLOW: "A scale is beyond the range of float16, in which files store it; check the weights.",
}

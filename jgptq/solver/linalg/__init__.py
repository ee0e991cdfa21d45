"""Triangular systems and the factor of the damped Hessian."""

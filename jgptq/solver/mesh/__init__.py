"""The placement on several devices: the sum over tokens, the factorization, and the reading of matrices in slabs."""

from jgptq.solver.mesh.axes import make_mesh
from jgptq.solver.mesh.placement import OnMesh

__all__ = ["OnMesh", "make_mesh"]

"""From a target to codes: grids, the sequence of rows, the loop with error compensation, refinement."""

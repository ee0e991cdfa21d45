"""Mixtures of experts: leaves, linears and routing of all experts of a block at once, and the stages that they make of it."""

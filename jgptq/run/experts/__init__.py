"""Stages whose linears are stacked over experts: each expert solved on the tokens that are routed to it."""

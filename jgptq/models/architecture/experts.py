"""Switches of a mixture of experts: how many, how wide, and how a router chooses among them."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts: each token goes to the few whose router scores are the largest.

    With logits `l = h R` of a router R the scores are `softmax(l)` or `sigmoid(l)`, and those of the chosen experts are the
    weights of their outputs.
    """

    num_experts: int  # E
    experts_per_token: int  # how many a token goes to
    width: int  # of the inner layer of one expert
    sparse_layers: tuple[bool, ...]  # per block: whether its MLP is a mixture
    score: str = "softmax"  # of the router's logits: softmax or sigmoid
    normalized: bool = False  # the weights of a token are divided by their sum
    weight_scale: float = 1.0  # factor of all weights
    groups: int = 1  # experts are chosen from a few groups of neighbours; 1: from all
    kept_groups: int = 1  # how many
    group_best: int = 1  # a group's score is the sum of this many of its best
    corrected: bool = False  # experts are chosen by their scores plus a learned vector, which the weights leave out
    shared_width: int = 0  # of the inner layer of an MLP that every token passes as well; 0: there is none
    shared_gate: bool = False  # its output is multiplied by a sigmoid of the token's own

    @property
    def grouped(self) -> bool:
        """Whether experts are chosen from a few groups."""
        return self.groups > 1

    @property
    def shared_experts(self) -> int:
        """The width of the shared MLP in experts."""
        return self.shared_width // self.width

"""How many tokens of which kind a pass has, on which bytes depend.  SPEC RECIPE-14."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from refimpl.checkpoint.names import mtp_layers
from refimpl.config.model import ModelConfig


@dataclass(frozen=True)
class Load:
    """One forward pass.  Entry 0 of a sequence is the main model, entry k is MTP module k; a module is there
    if it has an entry.

    size, length: B sequences of S tokens, T = B * S.
    targets: tokens with a target.
    exist: tokens that are no padding, and sequences: what balance losses are about.
    losses: kinds of balance losses, none in a pass without training.
    experts: layer -> tokens of each expert, padding included; even where a layer is not named.
    """

    size: int
    length: int
    targets: Sequence[int]
    exist: Sequence[int]
    sequences: Sequence[int]
    losses: Sequence[str] = ()
    experts: Mapping[int, Sequence[int]] = field(default_factory=dict)

    @staticmethod
    def full(config: ModelConfig, size: int, length: int, training: bool = True) -> Load:
        """Sequences without padding in which every token has a target, and the modules ones further on."""
        depths = 1 + (len(mtp_layers(config)) if training else 0)
        left = tuple(size * max(length - k, 0) for k in range(depths))
        losses = ("sequence",) if training and config.n_routed_experts else ()
        return Load(size, length, left, left, (size,) * depths, losses)

    @property
    def tokens(self) -> int:
        return self.size * self.length

    @property
    def modules(self) -> int:
        return len(self.targets) - 1

    def of_experts(self, config: ModelConfig, layer: int) -> list[int]:
        """The tokens of each expert that has some."""
        given = self.experts.get(layer)
        if given is None:
            each, more = divmod(self.tokens * config.num_experts_per_tok, config.n_routed_experts)
            given = [each + (i < more) for i in range(config.n_routed_experts)]
        return [int(n) for n in given if n]

"""All that a run has to keep from one step to the next.  SPEC STEP-1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from refimpl.checkpoint import names
from refimpl.checkpoint.weights import DictWeights, Weights
from refimpl.config.choices import Choices
from refimpl.config.model import ModelConfig
from refimpl.config.training import TrainingConfig
from refimpl.errors import Invalid
from refimpl.model import Model
from refimpl.numerics.arithmetic import Arithmetic, Array
from refimpl.numerics.precision import arithmetic
from refimpl.training.adamw import Powers


@dataclass(frozen=True)
class State:
    """Master weights and selection biases, moments, average, configurations and counters.

    Arrays are in the carrier of the precision.  A step makes a new state and changes none.
    """

    config: ModelConfig
    training: TrainingConfig
    choices: Choices
    precision: str
    weights: Mapping[str, Array]  # parameters and selection biases by checkpoint name
    first: Mapping[str, Array]  # moments of the parameters
    second: Mapping[str, Array]
    average: Mapping[str, Array] = field(default_factory=dict)  # of the parameters, when ema_decay is not 0
    powers: Powers = field(default_factory=Powers)
    steps: int = 0
    tokens: int = 0

    @cached_property
    def ar(self) -> Arithmetic:
        return arithmetic(self.precision)

    @cached_property
    def model(self) -> Model:
        """The model that the weights make, with lambda and gamma as they are now."""
        read = {name: self.ar.at("optim.weight", w) for name, w in self.weights.items()}
        weights = DictWeights(self.config, read)
        return Model(self.config, weights, self.ar, self.choices, training=self.training.at(self.tokens))


def start(
    config: ModelConfig,
    weights: Weights | Mapping[str, Array],
    training: TrainingConfig,
    choices: str | Choices = "hf",
    precision: str = "exact",
) -> State:
    """The state before the first step: moments are zeros, the average is the weights.

    Raises: Invalid for names that are missing or unknown.
    """
    if not isinstance(precision, str):
        raise Invalid(f"precision is {precision!r}, but a state needs the name of one, to be saved.")
    ar = arithmetic(precision)
    given = weights if isinstance(weights, Weights) else DictWeights(config, weights)
    specs = {name: spec for name, spec in names.parameters(config).items() if spec.kind != "scale"}
    missing = [name for name in specs if name not in given]
    if missing:
        raise Invalid(f"tensor {missing[0]} is not among the weights, but training needs all of them.")
    masters = {name: ar.at("optim.master", ar.array(given[name])) for name in specs}
    learned = [name for name, spec in specs.items() if spec.kind == "param"]
    return State(
        config,
        training,
        choices if isinstance(choices, Choices) else Choices.named(choices),
        precision,
        masters,
        {name: ar.zeros(masters[name].shape) for name in learned},
        {name: ar.zeros(masters[name].shape) for name in learned},
        {name: masters[name] for name in learned} if training.ema_decay else {},
    )

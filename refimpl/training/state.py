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
from refimpl.layers.context import Ops
from refimpl.layers.ops import DEEPSEEK_V3
from refimpl.model import Model
from refimpl.numerics.arithmetic import Arithmetic, Array
from refimpl.numerics.precision import arithmetic
from refimpl.numerics.recipe import Recipe
from refimpl.training.adamw import Powers
from refimpl.training.rules import DEEPSEEK_V3 as RULES
from refimpl.training.rules import Rules


class Own(DictWeights):
    """Weights of a state: names, shapes and values were checked when the run began, and a step keeps the
    first two.  What a step makes that is not finite ends the next one (STEP-5)."""

    checked = True

    def __getitem__(self, name: str) -> Array:
        return self.stored_codes(self.canonical(name))


@dataclass(frozen=True)
class State:
    """Master weights and selection biases, moments, average, configurations and counters.

    Arrays are in the carrier of the precision.  A step makes a new state and changes none.
    """

    config: ModelConfig
    training: TrainingConfig
    choices: Choices
    ar: Arithmetic
    weights: Mapping[str, Array] = field(repr=False)  # parameters and selection biases by checkpoint name
    first: Mapping[str, Array] = field(repr=False)  # moments of the parameters
    second: Mapping[str, Array] = field(repr=False)
    average: Mapping[str, Array] = field(default_factory=dict, repr=False)  # when ema_decay is not 0
    powers: Powers = field(default_factory=Powers)
    steps: int = 0
    tokens: int = 0
    ops: Ops = field(default=DEEPSEEK_V3, repr=False)
    rules: Rules = field(default=RULES, repr=False)

    @property
    def precision(self) -> str:
        """The name of the arithmetic."""
        return self.ar.name

    @cached_property
    def model(self) -> Model:
        """The model that the weights make, with lambda and gamma as they are now."""
        read = {name: self.ar.at("optim.weight", w) for name, w in self.weights.items()}
        weights = Own(self.config, read)
        now = self.rules.at(self.training, self.tokens)
        return Model(self.config, weights, self.ar, self.choices, self.ops, now)


def start(
    config: ModelConfig,
    weights: Weights | Mapping[str, Array],
    training: TrainingConfig,
    choices: str | Choices = "hf",
    precision: str | Recipe | Arithmetic = "exact",
    ops: Ops = DEEPSEEK_V3,
    rules: Rules = RULES,
) -> State:
    """The state before the first step: moments are zeros, the average is the weights.

    Raises: Invalid for names that are missing or unknown.
    """
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
        ar,
        masters,
        {name: ar.zeros(masters[name].shape) for name in learned},
        {name: ar.zeros(masters[name].shape) for name in learned},
        {name: masters[name] for name in learned} if training.ema_decay else {},
        ops=ops,
        rules=rules,
    )

"""What the tests of layers and model share: small configurations, random weights, contexts, the complex step.

The complex step: f(x + i h v) = f(x) + i h <f'(x), v> + O(h^2) for an analytic f, so the directional
derivative is the imaginary part over h, with no subtraction and therefore no cancellation; with h = 1e-30 the
remainder is far below the rounding.  `Complex` is the arithmetic that carries complex arrays through layers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refimpl
from refimpl.checkpoint import names
from refimpl.config.choices import Choices
from refimpl.config.model import ModelConfig
from refimpl.errors import Error
from refimpl.layers import rope
from refimpl.layers.batch import Batch, allowed
from refimpl.layers.context import Context, Cotangents
from refimpl.layers.ops import DEEPSEEK_V3
from refimpl.numerics.arithmetic import Exact, Weight
from refimpl.numerics.floating import Floating
from refimpl.parameters import placed

RECORDINGS = Path(__file__).parent / "recordings" / "models"
STEP = 1e-30

# A complex step has no truncation error, so what remains is the rounding of two float64 computations: at most
# 6e-15 of the size of the terms in all tests of layers.  A wrong term is many digits above.
TOLERANCE = 1e-12

BASE = {
    "model_type": "deepseek_v3",
    "vocab_size": 29,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "intermediate_size": 10,
    "moe_intermediate_size": 6,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_attention_heads": 2,
    "q_lora_rank": 7,
    "kv_lora_rank": 5,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 6,
    "v_head_dim": 3,
    "rms_norm_eps": 1e-6,
    "rope_theta": 100.0,
    "max_position_embeddings": 64,
}
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
}
V2 = {
    "model_type": "deepseek_v2",
    "scoring_func": "softmax",
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": False,
}


def config(**changes: Any) -> ModelConfig:
    """The base configuration, a V3 of two layers, with other values."""
    return ModelConfig.from_dict(BASE | changes)


def random_weights(cfg: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Values by checkpoint name that keep activations near 1, with a selection bias that matters."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, spec in names.parameters(cfg).items():
        draw = rng.standard_normal(spec.shape)
        if spec.role == "gain":
            weights[name] = 1.0 + 0.3 * draw
        elif spec.kind == "buffer":
            weights[name] = 0.3 * draw
        else:
            weights[name] = draw if spec.role == "embedding" else draw * 1.5 / np.sqrt(spec.shape[-1])
    return weights


def random_ids(cfg: ModelConfig, shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, cfg.vocab_size, shape)


def model(
    cfg: ModelConfig | None = None, seed: int = 1, precision: Any = "float64", **more: Any
) -> refimpl.Model:
    cfg = cfg or config()
    return refimpl.load((cfg, random_weights(cfg, seed)), precision, **more)


class Complex(Floating):
    """Test-only: complex128 through the layers.  Decisions, maxima and masks look at the real part."""

    def __init__(self) -> None:
        super().__init__(np.complex128)

    def zeros(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape, np.complex128)

    def decide(self, x: np.ndarray) -> np.ndarray:
        return x.real

    def max(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.take_along_axis(x, np.expand_dims(x.real.argmax(axis), axis), axis).squeeze(axis)

    def sigmoid(self, x: np.ndarray) -> np.ndarray:
        return 1.0 / (1.0 + np.exp(-x))


class Given:
    """Parameters from a dictionary of arrays."""

    def __init__(self, weights: Mapping[str, np.ndarray], ar: Any) -> None:
        self.weights, self.ar = weights, ar

    def array(self, name: str) -> np.ndarray:
        return self.ar.array(self.weights[name])

    def weight(self, name: str) -> Weight:
        return placed(self.ar.weight(self.weights[name]), name)


FLOAT64 = Floating(np.float64)
EXACT = Exact()
COMPLEX = Complex()


def context(
    weights: Mapping[str, np.ndarray] | None = None,
    path: str = "m",
    cfg: ModelConfig | None = None,
    choices: Choices | None = None,
    ar: Any = FLOAT64,
    cotangents: Mapping[str, np.ndarray] | None = None,
    **more: Any,
) -> Context:
    """The context of a module at `path`, whose weights are named from there."""
    full = {f"{path}.{leaf}" if path else leaf: w for leaf, w in (weights or {}).items()}
    given = Cotangents({k: np.asarray(v) for k, v in (cotangents or {}).items()})
    return Context(
        ar,
        DEEPSEEK_V3,
        Given(full, ar),
        cfg or config(),
        choices or Choices(),
        path,
        cotangents=given,
        **more,
    )


def batch(
    ar: Any, size: int, length: int, cfg: ModelConfig | None = None, choices: Choices | None = None
) -> Batch:
    """Plain causal sequences."""
    cfg = cfg or config()
    places = np.tile(np.arange(length), size)
    segments = np.zeros((size, length), np.int64)
    tables = rope.tables(context(cfg=cfg, ar=ar, choices=choices), places)
    return Batch(size, length, tables, allowed(segments))


def worst_gradient_error(
    forward: Callable[[Any, dict[str, np.ndarray]], np.ndarray],
    at: Mapping[str, np.ndarray],
    gradients: Mapping[str, np.ndarray],
    cotangent: np.ndarray,
    seed: int = 0,
    directions: int = 3,
) -> float:
    """How far hand-written gradients are from the complex step, relative to the size of the summed terms.

    forward(ar, values) computes y from the named `at`; gradients[name] is claimed to be that of
    <cotangent, y>.  Every name is tried along random directions.
    """
    rng, worst = np.random.default_rng(seed), 0.0
    assert set(at) == set(gradients), set(at) ^ set(gradients)
    for name, point in at.items():
        for _ in range(directions):
            direction = rng.standard_normal(point.shape)
            stepped = {k: v + 0j for k, v in at.items()} | {name: point + 1j * STEP * direction}
            derivative = (cotangent * forward(COMPLEX, stepped).imag).sum() / STEP
            terms = gradients[name] * direction
            size = np.sqrt((terms**2).sum())
            worst = max(worst, abs(terms.sum() - derivative) / size if size else abs(derivative))
    return worst


def bits(x: Any) -> bytes:
    """The bytes of an array: equal for equal bits only."""
    array = np.asarray(x)
    return str(array.dtype).encode() + str(array.shape).encode() + array.tobytes()


def same_bits(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> None:
    """Two mappings hold the same names with the same bits."""
    assert set(a) == set(b)
    assert [name for name in a if bits(a[name]) != bits(b[name])] == []


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """max|a - b| / max|b|: what agreement "to 1e-9" is measured by.  Zeros must be zeros."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    if not expected.any():
        assert not found.any()
        return 0.0
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def one_sentence(caught: pytest.ExceptionInfo[Any], *fragments: str) -> None:
    """The error is refimpl's; its message is one sentence with all the fragments: thing, found, required."""
    assert isinstance(caught.value, Error)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith("."), text
    assert not re.search(r"\.\s", text), text  # no second sentence
    for fragment in fragments:
        assert fragment in text, f"{fragment!r} is not in {text!r}"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())

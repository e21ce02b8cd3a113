"""The inputs of a forward pass, checked before anything is computed.  SPEC MODEL-2, MODEL-3, MASK-1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from refimpl.config.model import ModelConfig
from refimpl.errors import Invalid
from refimpl.layers import loss
from refimpl.layers.batch import PADDING, Inputs, positions
from refimpl.numerics.arithmetic import Array


def read_inputs(
    config: ModelConfig,
    input_ids: npt.ArrayLike,
    labels: npt.ArrayLike | None,
    targets: npt.ArrayLike | None,
    mask: npt.ArrayLike | None,
    segment_ids: npt.ArrayLike | None,
    position_ids: npt.ArrayLike | None,
) -> Inputs:
    """Everything as integer arrays of one shape, with the defaults filled in.  Raises Invalid."""
    ids = _integers("input_ids", input_ids)
    if ids.ndim != 2 or 0 in ids.shape:
        raise Invalid(
            f"input_ids has shape {ids.shape}, but it has to be (batch, sequence), neither of them 0."
        )
    _in_range("input_ids", ids, 0, config.vocab_size, "the vocabulary")
    segments = (
        np.zeros(ids.shape, np.int64) if segment_ids is None else _like("segment_ids", segment_ids, ids)
    )
    if segments.min() < PADDING:
        raise Invalid(f"segment_ids has {segments.min()}, but a segment is at least 0, or -1 for padding.")
    if mask is not None:
        flags = _like("mask", mask, ids)
        _in_range("mask", flags, 0, 2, "0 and 1")
        segments = np.where(flags == 1, segments, PADDING)
    places = positions(segments) if position_ids is None else _like("position_ids", position_ids, ids)
    used = np.where(segments == PADDING, 0, places)  # padding may be longer than the table
    _in_range("position_ids", used, 0, config.max_position_embeddings, "max_position_embeddings")
    if labels is not None and targets is not None:
        raise Invalid("labels and targets are both given, but only one of them may be.")
    wanted = None
    if targets is not None:
        wanted = _wanted("targets", targets, ids, segments, config.vocab_size)
    elif labels is not None:
        wanted = _next_labels(_wanted("labels", labels, ids, segments, config.vocab_size), segments)
    return Inputs(ids, segments, places, wanted)


def read_routing(
    config: ModelConfig, routing: Mapping[int, Any], shape: tuple[int, ...], modules: int = 0
) -> dict[str, tuple[Array, Array | None]]:
    """{layer: ids or (ids, weights)}  ->  {path of the gate: (ids (T, K), weights (T, K) or None)}.

    Raises: Invalid.
    """
    ready: dict[str, tuple[Array, Array | None]] = {}
    want = (*shape, config.num_experts_per_tok)
    if not isinstance(routing, Mapping):
        raise Invalid(f"routing is a {type(routing).__name__}, but it has to map layers to experts.")
    for layer, given in routing.items():
        if layer not in range(config.num_hidden_layers + modules) or not config.is_moe_layer(layer):
            raise Invalid(f"routing names layer {layer!r}, but that is no layer with experts.")
        ids, weights = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
        ids = _integers(f"routing of layer {layer}", ids)
        if ids.shape != want:
            raise Invalid(f"routing of layer {layer} has shape {ids.shape}, but it has to be {want}.")
        _in_range(f"routing of layer {layer}", ids, 0, config.n_routed_experts, "the routed experts")
        ordered = np.sort(ids, -1)
        if (ordered[..., 1:] == ordered[..., :-1]).any():
            raise Invalid(
                f"routing of layer {layer} names an expert twice for a token, but each may be there once."
            )
        if weights is not None:
            weights = read_numbers(f"routing weights of layer {layer}", weights)
            if weights.shape != want:
                raise Invalid(
                    f"routing weights of layer {layer} have shape {weights.shape}, but it has to be {want}."
                )
            weights = weights.reshape(-1, want[-1])
        ready[f"model.layers.{layer}.mlp.gate"] = (ids.reshape(-1, want[-1]), weights)
    return ready


def read_numbers(name: str, x: npt.ArrayLike) -> Array:
    """Finite real numbers as an array.  Raises Invalid."""
    array = _array(name, x)
    if array.dtype.kind not in "fiu":
        raise Invalid(f"{name} has dtype {array.dtype}, but it has to be an array of real numbers.")
    if not np.isfinite(array).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise Invalid(f"{name} has {array[index]} at {index}, but all its values have to be finite.")
    return array


def _array(name: str, x: npt.ArrayLike) -> Array:
    try:
        return np.asarray(x)
    except ValueError:
        raise Invalid(f"{name} is ragged, but all its rows must have the same length.") from None


def _integers(name: str, x: npt.ArrayLike) -> Array:
    array = _array(name, x)
    if array.dtype.kind not in "iub" or array.dtype == np.uint64:
        raise Invalid(f"{name} has dtype {array.dtype}, but it has to be an integer array.")
    return array.astype(np.int64)


def _like(name: str, x: npt.ArrayLike, ids: Array) -> Array:
    array = _integers(name, x)
    if array.shape != ids.shape:
        raise Invalid(f"{name} has shape {array.shape}, but input_ids has {ids.shape}.")
    return array


def _wanted(name: str, x: npt.ArrayLike, ids: Array, segments: Array, vocabulary: int) -> Array:
    """Targets or labels (B, S), none in padding."""
    array = np.where(segments == PADDING, loss.IGNORED, _like(name, x, ids))
    ids_only = np.where(array == loss.IGNORED, 0, array)
    _in_range(name, ids_only, 0, vocabulary, "the vocabulary, or -100 for none")
    return array


def _in_range(name: str, x: Array, low: int, high: int, what: str) -> None:
    bad = (x < low) | (x >= high)
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        raise Invalid(f"{name} has {x[bad][0]} at {index}, but it has to be in [{low}, {high}): {what}.")


def _next_labels(labels: Array, segments: Array) -> Array:
    """labels (B, S)  ->  targets (B, S): the next token's label, none at the end of a segment."""
    targets = np.full(labels.shape, loss.IGNORED)
    same = segments[:, 1:] == segments[:, :-1]
    targets[:, :-1] = np.where(same, labels[:, 1:], loss.IGNORED)
    return targets

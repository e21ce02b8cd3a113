"""A model's loss, and the gradients that each rank of a pipeline makes of its own stages and microbatches.
SPEC CASE-20, PIPE-51 to PIPE-59."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from refimpl.checkpoint.weights import DictWeights
from refimpl.model import Model
from refimpl.pipeline import arrays
from refimpl.pipeline.execute import execute
from refimpl.setting import Outputs, Setting
from refimpl.training_programs import microbatches


def pipelined(s: Setting) -> Outputs:
    """input_ids, targets or labels, mask, segment_ids, position_ids are (M, B, S): M microbatches."""
    training = s.rules.at(s.training, 0)
    model = Model(s.config, DictWeights(s.config, s.weights), s.ar, s.choices, s.ops, training)
    batches = microbatches(s, range(len(s.inputs["input_ids"])))
    found = execute(model, arrays.of(s.arguments), batches, s.arguments["split"])
    out: Outputs = {f"loss.{part}": np.array([value]) for part, value in found.losses.items()}
    out["loss"] = np.array([found.loss])
    for rank, own in enumerate(found.per_rank):
        out |= {f"grad.rank{rank}.{name}": own[name] for name in sorted(own)}
    return out


PIPELINE_PROGRAMS: dict[str, Callable[[Setting], Outputs]] = {"pipelined": pipelined}

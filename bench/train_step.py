"""One training step in float32, beside transformers' DeepseekV3 with torch's AdamW in one run.

    python bench/train_step.py [--model small|PRESET] [--batch 8] [--length 128] [--threads 1] [--steps 20]
                               [--json FILE]

`small` is the model that `refimpl train` trains by default, without its MTP module, which transformers cannot
train.  A step is forward, backward, clipping, AdamW on every parameter and the update of the selection
biases.  Both begin with the same weights and read the same batches; their steps alternate, so that whatever
else the machine does falls on both.  transformers has eager attention and grouped experts (its default),
torch's AdamW its defaults.  The losses of both are shown, since they have to stay together.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from forward_backward import ROOT, THREAD_VARIABLES, clocked, transformers_model


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="small", metavar="small|PRESET")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20, help="timed; two more warm up")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


class Theirs:
    """The same model and optimiser in torch."""

    def __init__(self, config: Any, weights: dict[str, Any], training: Any) -> None:
        import torch

        self.training = training
        self.model = transformers_model(config, weights, "grouped_mm").train()
        self.gates = [(layer.mlp.gate, []) for layer in self.model.model.layers if hasattr(layer.mlp, "gate")]
        for gate, seen in self.gates:  # what the router is given, to count who is chosen
            gate.register_forward_hook(lambda _module, _given, out, seen=seen: seen.append(out))
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(),
            lr=training.learning_rate,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_epsilon,
            weight_decay=training.weight_decay,
        )

    def step(self, ids: Any) -> float:
        import torch

        for _, seen in self.gates:
            seen.clear()
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training.clip_norm)
        self.optimiser.step()
        with torch.no_grad():
            for gate, seen in self.gates:
                load = torch.bincount(_chosen(seen[0]).flatten(), minlength=gate.weight.shape[0])
                error = load.sum() - len(load) * load
                gate.e_score_correction_bias += self.training.bias_update_speed * torch.sign(error)
        return float(loss.detach())


def _chosen(out: Any) -> Any:
    """The experts among what a router gives: its integers."""
    return next(x for x in out if not x.is_floating_point())


def main() -> int:
    options = parse()
    if any(os.environ.get(v) != str(options.threads) for v in THREAD_VARIABLES):  # read when NumPy is loaded
        os.environ |= dict.fromkeys(THREAD_VARIABLES, str(options.threads))
        os.execv(sys.executable, [sys.executable, *sys.argv])
    sys.path.insert(0, str(ROOT))

    import numpy as np
    import torch
    import transformers
    from tabulate import tabulate

    import refimpl
    from refimpl.numerics.generator import integers
    from refimpl.training.initialise import initialise
    from refimpl.training.run import SHORT, SMALL

    torch.set_num_threads(options.threads)
    fields = SMALL if options.model == "small" else refimpl.preset(options.model).to_dict()
    fields = {name: value for name, value in fields.items() if name != "quantization_config"}
    config = refimpl.ModelConfig.from_dict({**fields, "num_nextn_predict_layers": 0})
    training = refimpl.TrainingConfig.from_dict(
        {**SHORT, "warmup_steps": 0, "learning_rate": 1e-3, "balance_loss_weight": 0.0}
    )
    drawn = initialise(config, training)
    weights = {name: np.asarray(w, np.float32) for name, w in drawn.items()}
    state = refimpl.training.start(config, weights, training, precision="float32")
    theirs = Theirs(config, weights, training)
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    losses: list[tuple[float, float]] = []
    for n in range(options.steps + 2):
        ids = integers(n, "bench/ids", (options.batch, options.length), 0, config.vocab_size)
        batch = [{"input_ids": ids, "labels": ids}]
        ours, (state, report) = clocked(lambda batch=batch, now=state: refimpl.training.step(now, batch))
        other, loss = clocked(lambda ids=ids: theirs.step(torch.from_numpy(ids)))
        losses.append((report.loss, loss))
        if n >= 2:
            times["ours"].append(ours)
            times["theirs"].append(other)
    apart = max(abs(a - b) for a, b in losses)
    names = {"ours": "refimpl float32", "theirs": "transformers and torch AdamW"}
    medians = {key: statistics.median(own) for key, own in times.items()}
    rows = [
        [names[key], 1e3 * min(own), 1e3 * medians[key], medians[key] / medians["theirs"], losses[-1][i]]
        for i, (key, own) in enumerate(times.items())
    ]
    print(
        f"{options.model}: {sum(w.size for w in weights.values()) / 1e6:.2f}M parameters, "
        f"{options.batch} x {options.length} tokens, {options.threads} threads, {options.steps} steps; "
        f"NumPy {np.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    print(tabulate(rows, ["", "best ms", "median ms", "time / torch's", "last loss"], floatfmt=".3f"))
    print(f"Largest difference of a loss in {len(losses)} steps: {apart:.1e}.")
    if options.json:
        data = {"times": times, "losses": losses, "ratio": medians["ours"] / medians["theirs"]}
        Path(options.json).write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

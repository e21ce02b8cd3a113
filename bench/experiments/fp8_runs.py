"""What `fp8_training.py` runs: trainings, replays and single passes, each a task with a result of its own.

The model has every part of V3: 1 dense layer and LAYERS - 1 with experts, one MTP module, 8 experts of 4
groups, 2 chosen of 2 groups, a shared one; all widths are multiples of 128, so that tiles are whole.

Routing is free, or forced to that of the bf16 training of the same seed, step by step and also on the
held-out text (in replays: to that of v3-fp8; in single passes: to that of float32).
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from small_training import LENGTH, TRAINING, corpora

from refimpl.config.model import ModelConfig
from refimpl.config.training import TrainingConfig
from refimpl.model import load
from refimpl.numerics import recipe as rules
from refimpl.numerics.precision import arithmetic, recipe
from refimpl.numerics.recipe import Recipe
from refimpl.training import State, start, step
from refimpl.training.initialise import initialise
from refimpl.training.run import SMALL

SEQUENCES = 8  # of a step
EVERY = 10  # steps between two validations
HELD_OUT = 32  # sequences of a validation
REPLAYED = 10  # steps of a replay
RATE = 5e-4
CONFIG: dict[str, Any] = {
    **SMALL,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 96,
    "qk_rope_head_dim": 32,
    "v_head_dim": 128,
    "num_nextn_predict_layers": 1,
}

BASE, FP8, REFERENCE = "bf16", "v3-fp8", "float32"
BLOCKS, TENSOR = "dy in 128x128 blocks", "one scale a tensor"
DGRAD = "the same for Dgrad alone"
E5M2, UNPROMOTED = "dy in E5M2", "no promotion"
HOPPER, POWERS = "Hopper's accumulation", "v3.1-ue8m0"
TRAINED = (BASE, REFERENCE, FP8, BLOCKS, TENSOR, E5M2)


def _accumulated(name: str) -> list[str]:
    return [f"*.{product}.accumulator={name}" for product in ("fprop", "dgrad", "wgrad")]


def precisions() -> dict[str, str | Recipe]:
    """By name: float32, bf16, v3-fp8 with promote_fp32, that with one thing changed, v3.1-ue8m0.

    Blocks, as in appendix B.2 of the report: one quantisation of the gradient in blocks of 128x128 serves
    Dgrad and, transposed, Wgrad."""
    fast = recipe("v3-fp8@float32")
    fp8 = fast.set(_accumulated("promote_fp32"))
    coded = [rule.site for rule in fp8.rules if rule.scaled]
    dgrad = [site for site in coded if site.endswith(".dy")]
    dy = [*dgrad, *(site for site in coded if site.endswith(".dy.wgrad"))]
    found: dict[str, str | Recipe] = {
        REFERENCE: "float32",
        BASE: recipe("bf16@float32"),
        FP8: fp8,
        BLOCKS: fp8.set(f"{site}.tile=128x128" for site in dy),
        DGRAD: fp8.set(f"{site}.tile=128x128" for site in dgrad),
        TENSOR: fp8.set(f"{site}.tile=tensor" for site in coded),
        E5M2: fp8.set(f"{site}.format=e5m2" for site in dy),
        HOPPER: fast,
        POWERS: recipe("v3.1-ue8m0@float32").set(_accumulated("promote_fp32")),
    }
    if "unpromoted" in rules.ACCUMULATORS:
        found[UNPROMOTED] = fast.set(_accumulated("unpromoted"))
    return found


@dataclass(frozen=True)
class Task:
    """kind: train, replay or passes; needs: tasks whose files it reads."""

    kind: str
    name: str
    seed: int
    forced: bool = False

    @property
    def key(self) -> str:
        routing = "forced" if self.forced else "free"
        return re.sub(r"\W+", "-", f"{self.kind} {self.name} {routing} {self.seed}")

    @property
    def needs(self) -> list[Task]:
        if self.kind == "train":
            return [Task("train", BASE, self.seed)] if self.forced else []
        first = [Task("train", FP8, self.seed)]
        return (
            [*first, Task("replay", FP8, self.seed)] if self.kind == "replay" and self.name != FP8 else first
        )


def tasks(seeds: int) -> list[Task]:
    """All of them, those that others wait for and long ones first."""
    known, every, both = precisions(), range(seeds), (False, True)
    changed = (E5M2, TENSOR, BLOCKS)
    slow = [name for name in (HOPPER, UNPROMOTED) if name in known]
    return [
        *(Task("train", name, seed) for name in (BASE, FP8) for seed in every),
        *(Task("train", name, seed, forced) for forced in both for name in changed for seed in every),
        *(Task("train", FP8, seed, True) for seed in every),
        *(Task("replay", FP8, seed) for seed in every),
        *(Task("train", REFERENCE, seed, forced) for seed in every for forced in both),
        *(Task("replay", name, seed, forced) for name in slow for seed in every for forced in both),
        *(Task("passes", "all", seed) for seed in every),
        *(Task("replay", BASE, seed, forced) for seed in every for forced in both),
    ]


def training(steps: int) -> TrainingConfig:
    """V3's: a rise, a constant rate, and in the second half a cosine to a tenth."""
    half = steps * SEQUENCES * LENGTH // 2
    return TrainingConfig(
        **{
            **TRAINING,
            "batch_sequences": SEQUENCES,
            "final_batch_sequences": SEQUENCES,
            "learning_rate": RATE,
            "learning_rate_schedule": "cosine",
            "constant_tokens": half,
            "cosine_tokens": half,
            "cosine_learning_rate": RATE / 10,
            "balance_loss_weight": 1e-4,
            "bias_update_speed": 1e-3,
        }
    )


def perform(task: Task, steps: int, work: Path) -> dict[str, Any]:
    """The result of a task whose needs have been done."""
    kinds: dict[str, Callable[[Task, int, Path], dict[str, Any]]]
    kinds = {"train": train, "replay": replay, "passes": passes}
    with np.errstate(all="ignore"):
        return kinds[task.kind](task, steps, work)


def train(task: Task, steps: int, work: Path) -> dict[str, Any]:
    """Losses of every step and of every validation; leaves the state, and bf16 its routing, as files."""
    config, how = ModelConfig.from_dict(CONFIG), training(steps)
    learned, held_out = corpora()
    state = start(config, initialise(config, how, task.seed), how, "hf", precisions()[task.name])
    routing = _read(work, task.needs[0], "routing") if task.forced else {}
    recorded: dict[tuple[str, int], Any] = {}
    losses, validation = [], []
    for number in range(steps):
        one = _batch(learned, task.seed, number)
        if task.name == BASE:
            recorded["step", number] = _routed(state, one)
        state, report = step(state, [one | _forced(routing.get(("step", number)))])
        losses.append(report.losses["main"])
        if (number + 1) % EVERY == 0:
            held = _batch(held_out, 0, 0, HELD_OUT)
            result = state.model.forward(**held, **_forced(routing.get(("held out", number))), trace=())
            recorded["held out", number] = _experts(result)
            validation.append(result.losses["main"])
    _write(work, task, "state", _moving(state))
    if task.name == BASE:
        _write(work, task, "routing", recorded)
    return {"loss": losses, "validation": validation}


def replay(task: Task, steps: int, work: Path) -> dict[str, Any]:
    """Ten steps more from the state that v3-fp8 has reached; the distance of the weights from those that
    v3-fp8 reaches, in parts of the way that v3-fp8 went."""
    learned, _ = corpora()
    begun = _read(work, Task("train", FP8, task.seed), "state")
    base = None if task.name == FP8 else _read(work, Task("replay", FP8, task.seed), "end")
    state = _again(begun, steps, precisions()[task.name])
    routing, losses, last = {}, [], steps + REPLAYED - 1
    for number in range(steps, steps + REPLAYED):
        one = _batch(learned, task.seed, number)
        if base is None or (number == last and not task.forced):
            routing[number] = _routed(state, one)
        state, report = step(state, [one | _forced(base[1][number] if base and task.forced else None)])
        losses.append(report.losses["main"])
    if base is None:
        _write(work, task, "end", (dict(state.weights), routing))
        return {"loss": losses}
    weights, theirs = base
    far = _norm(state.weights[name] - weights[name] for name in begun["first"])
    way = _norm(weights[name] - begun["weights"][name] for name in begun["first"])
    flipped = {} if task.forced else {"flipped": _flipped(routing[last], theirs[last])}
    return {"loss": losses, "distance": far / way} | flipped


def passes(task: Task, steps: int, work: Path) -> dict[str, Any]:
    """Every precision, forward and backward on one batch of held-out text with the weights that v3-fp8 has
    reached, in bf16 as all read them, against float32."""
    begun = _read(work, Task("train", FP8, task.seed), "state")
    bf16 = arithmetic(recipe("bf16@float32"))
    weights = {name: bf16.at("optim.weight", w) for name, w in begun["weights"].items()}
    one = _batch(corpora()[1], task.seed + 1, 0)
    reference = _pass(weights, steps, REFERENCE, one)
    fp8 = {False: _pass(weights, steps, FP8, one), True: _pass(weights, steps, FP8, one, reference.routing)}
    found: dict[str, Any] = {}
    for name in precisions():
        for forced in (False, True):
            if name == REFERENCE:
                continue
            routing = reference.routing if forced else None
            got = fp8[forced] if name == FP8 else _pass(weights, steps, name, one, routing)
            found[f"{name}, {'forced' if forced else 'free'}"] = {
                "loss": got.loss / reference.loss - 1.0,
                "logits": _norm([got.logits - reference.logits]) / _norm([reference.logits]),
                "gradients": _apart(got.gradients, reference.gradients),
                "from v3-fp8": _apart(got.gradients, fp8[forced].gradients),
                "flipped": _flipped(got.routing, reference.routing),
            }
    return found


@dataclass(frozen=True)
class _Pass:
    loss: float
    logits: np.ndarray
    gradients: Mapping[str, np.ndarray]
    routing: Mapping[int, np.ndarray]


def _pass(weights: Any, steps: int, name: str, one: Any, routing: Any = None) -> _Pass:
    config = ModelConfig.from_dict(CONFIG)
    model = load((config, weights), precisions()[name], "hf", training(steps))
    result = model.forward(**one, **_forced(routing), trace=())
    gradients = dict(model.backward(result).items())
    return _Pass(result.losses["main"], result.logits, gradients, _experts(result))


def _batch(corpus: Any, seed: int, number: int, sequences: int = SEQUENCES) -> dict[str, Any]:
    ids, targets = corpus.batch(seed, number, sequences, LENGTH)
    return {"input_ids": ids, "targets": targets}


def _forced(routing: Any) -> dict[str, Any]:
    return {} if routing is None else {"routing": routing}


def _routed(state: State, one: Mapping[str, Any]) -> dict[int, np.ndarray]:
    return _experts(state.model.forward(**one, trace=()))


def _experts(result: Any) -> dict[int, np.ndarray]:
    """Layer -> topk_idx (B, S, K); positions that do not exist (an MTP module's last) get any."""
    found = {}
    for layer, (exists, _, idx) in result.gates.items():
        whole = np.tile(np.arange(idx.shape[1], dtype=np.int64), (len(exists), 1))
        whole[exists] = idx
        found[layer] = whole.reshape(*result.logits.shape[:2], -1)
    return found


def _flipped(found: Mapping[int, np.ndarray], theirs: Mapping[int, np.ndarray]) -> float:
    """The share of tokens, over all layers, that go to another set of experts."""
    return float(
        np.mean([(np.sort(found[layer]) != np.sort(theirs[layer])).any(-1).mean() for layer in theirs])
    )


def _norm(arrays: Any) -> float:
    return float(np.sqrt(sum(float(np.square(np.asarray(x, np.float64)).sum()) for x in arrays)))


def _apart(found: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> float:
    """Of all gradients as one vector."""
    return _norm(found[name] - g for name, g in theirs.items()) / _norm(theirs.values())


def _moving(state: State) -> dict[str, Any]:
    names = ("weights", "first", "second", "powers", "steps", "tokens")
    return {name: getattr(state, name) for name in names}


def _again(begun: Mapping[str, Any], steps: int, precision: Any) -> State:
    state = start(ModelConfig.from_dict(CONFIG), begun["weights"], training(steps), "hf", precision)
    return replace(state, **{name: begun[name] for name in begun if name != "weights"})


def _write(work: Path, task: Task, what: str, value: Any) -> None:
    (work / f"{task.key}.{what}").write_bytes(pickle.dumps(value))


def _read(work: Path, task: Task, what: str) -> Any:
    return pickle.loads((work / f"{task.key}.{what}").read_bytes())  # written by this very run

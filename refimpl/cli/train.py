"""`refimpl train`: arguments and printing.  The loop is in training/run.py."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from refimpl.cli.common import Commands, count, natural
from refimpl.config.choices import PROFILES, Choices
from refimpl.config.jsonfile import read_object
from refimpl.config.model import ModelConfig
from refimpl.config.training import TrainingConfig
from refimpl.errors import Invalid
from refimpl.numerics.precision import arithmetic, recipe
from refimpl.numerics.recipe import Recipe
from refimpl.numerics.recipes import RECIPES
from refimpl.training import files, picture
from refimpl.training.run import SHORT, SMALL, Plan, begin, train
from refimpl.training.state import State
from refimpl.training.stepping import Report

OUT: Final = "build/train"
CURVE: Final = "curve.csv"


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """The command `train`."""
    parser = commands.add_parser("train", help="train a small DeepSeek-V3 on a text file")
    parser.add_argument("text", metavar="TEXT", type=Path, help="any file; every byte is a token")
    parser.add_argument("--out", type=Path, default=Path(OUT), metavar="DIR", help=f"default: {OUT}")
    parser.add_argument("--steps", type=count, default=200, metavar="N", help="in all; default: 200")
    parser.add_argument("--every", type=count, default=50, metavar="N", help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="of weights and batches; default: 0"
    )
    parser.add_argument("--batch", type=count, metavar="N", help="sequences of a step; default: 8")
    parser.add_argument("--microbatches", type=count, default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--precision",
        default="float32",
        metavar="NAME",
        help=f"float32 (default), float64, exact, or a recipe ({', '.join(RECIPES)}), NAME@float32 for its "
        "fast form",
    )
    parser.add_argument(
        "--recipe-set",
        action="append",
        default=[],
        metavar="SITE.FIELD=VALUE",
        help="change a field of the recipe's rows, as `refimpl recipe NAME --set`; repeatable",
    )
    parser.add_argument("--choices", default="hf", help=f"{', '.join(PROFILES)}; default: hf")
    parser.add_argument("--config", type=Path, metavar="FILE", help="config.json; default: a small V3")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of the model's or of the training's configuration, VALUE in JSON; repeatable",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help=f"the curve; default: {CURVE} in --out")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curve and the experts' loads")
    parser.add_argument("--export", type=Path, metavar="DIR", help="write the weights as a checkpoint folder")
    parser.set_defaults(run=_train)


def _train(given: argparse.Namespace) -> int:
    if given.plot:
        picture.available()
    plan, csv = _plan(given), given.csv or given.out / CURVE
    state, corpus = begin(plan, given.out, given.resume)
    if state.steps > given.steps:
        raise Invalid(f"the checkpoint in {given.out} has {state.steps} steps, but --steps is {given.steps}.")
    given.out.mkdir(parents=True, exist_ok=True)
    last: tuple[Report, float] | None = None
    running = train(plan, state, corpus, given.steps, given.every, given.out, csv)
    with tqdm(total=given.steps, initial=state.steps, desc="training", disable=None, file=sys.stderr) as bar:
        for after, report, seconds in running:
            state, last = after, (report, seconds)
            bar.set_postfix_str(_line(report, seconds), refresh=False)
            bar.update()
    _told(given, state, last)
    if given.plot:
        picture.draw(csv, given.plot)
        print(f"picture: {given.plot}")
    if given.export:
        files.export(state, given.export)
        print(f"weights: {given.export}")
    return 0


def _told(given: argparse.Namespace, state: State, last: tuple[Report, float] | None) -> None:
    what = _line(*last) if last else "nothing to do"
    print(f"step {state.steps}, {state.tokens} tokens: {what}")
    print(f"checkpoint: {given.out}")


def _line(report: Report, seconds: float) -> str:
    mtp = f", MTP {report.losses['mtp']:.3f}" if "mtp" in report.losses else ""
    worst = max(report.max_violation.values(), default=0.0)
    speed = report.tokens / max(seconds, 1e-9)
    return f"loss {report.losses['main']:.3f}{mtp}, MaxVio {worst:.2f}, {speed:.0f} tokens/s"


def _plan(given: argparse.Namespace) -> Plan:
    """Raises Invalid, Missing, Unreadable, Unsupported."""
    model: dict[str, Any] = dict(SMALL) if given.config is None else read_object(given.config)
    training: dict[str, Any] = dict(SHORT)
    if given.batch is not None:
        training |= {"batch_sequences": given.batch, "final_batch_sequences": given.batch}
    known = {item.name for item in fields(ModelConfig)}
    of_training = {item.name for item in fields(TrainingConfig)}
    for name, value in map(_assigned, given.set):
        if name not in known | of_training:
            raise Invalid(f"--set names {name[:60]}, but it must be a field of a configuration.")
        (training if name in of_training else model)[name] = value
    return Plan(
        given.text,
        ModelConfig.from_dict(model),
        TrainingConfig.from_dict(training),
        Choices.named(given.choices),
        _precision(given.precision, given.recipe_set),
        given.seed,
        given.microbatches,
    )


def _precision(name: str, settings: Sequence[str]) -> str | Recipe:
    """The name, or the recipe of that name with rows changed.  Raises Invalid."""
    if not settings:
        return name
    if not hasattr(arithmetic(name), "recipe"):
        raise Invalid(f"--recipe-set changes a recipe, but --precision is {name}, which is none.")
    return recipe(name).set(settings)


def _assigned(text: str) -> Sequence[Any]:
    """NAME=VALUE; what is no JSON is text.  Raises Invalid."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise Invalid(f"--set is given {text[:60]!r}, but it must be NAME=VALUE.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _seed(text: str) -> int:
    value = natural(text)
    if value is None:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number from 0 on")
    return value

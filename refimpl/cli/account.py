"""`refimpl account`: what a configuration costs.  Each table is one section below."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from tabulate import tabulate

from refimpl.accounting import memory
from refimpl.accounting.load import Load
from refimpl.cli.common import HOLDS, Commands, count, write_json
from refimpl.config.jsonfile import read_object
from refimpl.config.model import ModelConfig
from refimpl.config.presets import PRESETS, preset
from refimpl.errors import Invalid
from refimpl.numerics.recipe_table import ready


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """The command `account`."""
    parser = commands.add_parser("account", help="count the bytes of training under recipes")
    parser.add_argument("model", metavar="PRESET|FILE", help=f"{', '.join(PRESETS)}, or a config.json")
    parser.add_argument(
        "--tokens",
        nargs=2,
        type=count,
        default=(1, 4096),
        metavar=("B", "S"),
        help="sequences and their length; default: 1 4096",
    )
    parser.add_argument(
        "--recipe",
        action="append",
        metavar="NAME",
        help="compare these; default: bf16, bf16 that computes again what v3-fp8 does, and v3-fp8",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SITE.FIELD=VALUE",
        help="change a row of the last recipe, as `refimpl recipe NAME --set`; repeatable",
    )
    parser.add_argument("--json", type=Path, metavar="F", help="write it as JSON, - for standard output")
    parser.set_defaults(run=_account)


def _account(given: argparse.Namespace) -> int:
    config = preset(given.model) if given.model in PRESETS else _read(given.model)
    found = _memory(given, config)
    if given.json is not None:
        write_json(given.json, {"model": given.model, "memory": memory.as_json(found)})
    if str(given.json) == "-":
        return HOLDS
    size, length = given.tokens
    print("Bytes per parameter in training\n")
    _print(memory.part_rows(found))
    _print(memory.parameter_rows(found))
    print(f"Bytes per token kept for backward, {size} x {length} tokens, every one with a target\n")
    for kind in memory.KINDS:
        _print(memory.activation_rows(found, kind))
    _print(memory.whole_rows(found))
    return HOLDS


def _memory(given: argparse.Namespace, config: ModelConfig) -> list[memory.Memory]:
    *others, last = [ready(name) for name in given.recipe or ("bf16", "v3-fp8")]
    if given.set:
        last = replace(last.set(given.set), name=f"{last.name}, changed")
    recipes = [*others, last]
    if given.recipe is None:
        recipes.insert(1, memory.recomputing(others[0], last))
    if len({recipe.name for recipe in recipes}) < len(recipes):
        raise Invalid("--recipe names a recipe twice, but each may be compared once.")
    return memory.memory(config, recipes, Load.full(config, *given.tokens))


def _print(table: memory.Table) -> None:
    head, rows = table
    if rows:
        right = ("left", *("right" for _ in head[1:]))
        print(tabulate(rows, head, disable_numparse=True, colalign=right))
        print()


def _read(name: str) -> ModelConfig:
    path = Path(name)
    if not path.exists():
        raise Invalid(f"model {name[:80]!r} is neither a file nor one of {', '.join(PRESETS)}.")
    return ModelConfig.from_dict(read_object(path))

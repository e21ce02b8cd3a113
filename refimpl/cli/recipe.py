"""`refimpl recipe`: the ready recipes, the rows of one, and what they come to for every linear."""

from __future__ import annotations

import argparse
from pathlib import Path

from tabulate import tabulate

from refimpl.cli.common import HOLDS, Commands, write_json
from refimpl.errors import Invalid
from refimpl.numerics.recipe_table import ABOUT, HEAD, PRODUCT_HEAD, as_json, product_rows, ready, rows
from refimpl.numerics.recipes import RECIPES


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """The command `recipe`."""
    parser = commands.add_parser("recipe", help="show how values are rounded, multiplied and kept, by site")
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"of {', '.join(RECIPES)}; default: a list")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SITE.FIELD=VALUE",
        help="change a field of a row, or carrier=float32; repeatable",
    )
    parser.add_argument("--sites", action="store_true", help="also the three GEMMs of every linear")
    parser.add_argument("--json", type=Path, metavar="F", help="write it as JSON, - for standard output")
    parser.set_defaults(run=_recipe)


def _recipe(given: argparse.Namespace) -> int:
    if given.name is None:
        if given.set or given.sites:
            raise Invalid("--set and --sites are about one recipe, but none is named.")
        if given.json is not None:
            write_json(given.json, {name: ABOUT.get(name, "") for name in RECIPES})
        if str(given.json) != "-":
            print(tabulate([(name, ABOUT.get(name, "")) for name in RECIPES], ("recipe", "what it is")))
        return HOLDS
    recipe = ready(given.name).set(given.set)
    if given.json is not None:
        write_json(given.json, as_json(recipe, given.sites))
    if str(given.json) == "-":
        return HOLDS
    print(f"{recipe.name}, between its sites {recipe.carrier}; the first row that fits a site counts\n")
    print(tabulate(rows(recipe), HEAD, disable_numparse=True))
    if given.sites:
        print()
        print(tabulate(product_rows(recipe), PRODUCT_HEAD, disable_numparse=True))
    return HOLDS

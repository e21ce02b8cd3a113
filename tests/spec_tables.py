"""The tables of SPEC.md that repeat what the code says.  `python tests/spec_tables.py` writes them anew."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.cases.claims import CLAIMS
from refimpl.checkpoint.dtypes import DTYPES
from refimpl.config.choices import CHOICES, PROFILES, Choice, Choices
from refimpl.config.model import FAMILY_DEFAULTS, ModelConfig
from refimpl.config.presets import PRESETS, preset
from refimpl.config.rules import show
from refimpl.config.training import TrainingConfig
from refimpl.numerics import recipe_table
from refimpl.numerics.blockscale import ACTIVATION, QUANTISERS, Quantiser, quantise
from refimpl.numerics.casts import CASTS
from refimpl.numerics.formats import FORMATS
from refimpl.numerics.recipes import RECIPES
from refimpl.numerics.sites import SITES
from refimpl.numerics.tensorcore import HMMA, QGMMA, Unit

SPEC = Path(__file__).parent.parent / "SPEC.md"
BLOCK = re.compile(r"(?<=^<!-- table: )([a-z0-9 .-]+)( -->\n)(.*?)(?=^<!-- end -->$)", re.M | re.S)


def blocks(text: str) -> dict[str, str]:
    """Name -> what stands between its marks."""
    return {match[1]: match[3].strip("\n") + "\n" for match in BLOCK.finditer(text)}


def written(text: str) -> str:
    """The text with every table as the code has it."""
    return BLOCK.sub(lambda match: f"{match[1]}{match[2]}\n{TABLES[match[1]]()}\n", text)


def _rows(*rows: tuple[str, ...]) -> str:
    head, *body = rows
    lines = [head, tuple("---" for _ in head), *body]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in lines)


def _code(value: Any) -> str:
    return f"`{value if isinstance(value, str) else show(value)}`"


def _fields(owner: type, absent: dict[str, str]) -> Iterator[tuple[str, ...]]:
    for item in fields(owner):
        if "rule" in item.metadata:
            default = "required" if item.default is MISSING else _code(_plain(item.default))
            rule = item.metadata["rule"].required
            yield f"`{item.name}`", item.metadata["doc"], rule, absent.get(item.name, default)


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def config() -> str:
    family = {name: "by family, CONF-4" for defaults in FAMILY_DEFAULTS.values() for name in defaults}
    head = ("field", "meaning", "must be", "when absent")
    more = ("`rope_scaling`", "YaRN", "CONF-3", "`null`")
    last = ("`quantization_config`", "FP8 blocks of the checkpoint, CKPT-4", "an object, or null", "`null`")
    return _rows(head, *_fields(ModelConfig, family), more, last)


def training() -> str:
    return _rows(("field", "meaning", "must be", "default"), *_fields(TrainingConfig, {}))


def presets() -> str:
    def row(name: str) -> tuple[str, ...]:
        c = preset(name)
        groups = "-" if c.groups == 1 else f"{c.kept_groups} of {c.groups}"
        layers = f"{c.num_hidden_layers}, {c.first_k_dense_replace} dense"
        latents = f"{c.q_lora_rank or '-'}, {c.kv_lora_rank}"
        widths = f"{c.qk_nope_head_dim}, {c.qk_rope_head_dim}, {c.v_head_dim}"
        experts = f"{c.n_routed_experts}, {c.n_shared_experts}, {c.num_experts_per_tok}"
        cells = (layers, c.hidden_size, c.num_attention_heads, latents, widths, experts, groups, c.vocab_size)
        return f"`{name}`", *map(str, cells)

    head = ("preset", "layers", "D", "H", "Q, C", "P, R, Wv", "N, shared, K", "kept groups", "V")
    return _rows(head, *map(row, PRESETS))


def profiles() -> str:
    def cell(choices: Choices, name: str) -> str:
        shown = _code(getattr(choices, name))
        return shown if getattr(choices, name) == getattr(PROFILES["hf"], name) else f"**{shown}**"

    rows = [(f"`{c.name}`", *(cell(profile, c.name) for profile in PROFILES.values())) for c in CHOICES]
    return _rows(("choice", *(f"`{name}`" for name in PROFILES)), *rows)


def choices() -> str:
    return "\n".join(map(_box, CHOICES))


def _box(choice: Choice) -> str:
    def shown(value: str | float) -> str:
        default = value == choice.default or (value == "null" and choice.default is None)
        return _code(value) + (" (default)" if default else "")

    rows = [(shown(value), who) for value, who in choice.alternatives.items()]
    if choice.rule is not None:
        rows.append((choice.rule.required, "the given value"))
    table = _rows(("alternative", "who, and what it means"), *rows)
    reason = f"Reason for the default: {choice.reason}."
    return f"#### Choice {choice.name}\n\n{choice.question}\n\n{table}\n{reason}\n"


def sites() -> str:
    return _rows(("site", "what crosses it"), *((f"`{site}`", what) for site, what in SITES.items()))


def recipe(name: str) -> str:
    rows = recipe_table.rows(RECIPES[name])
    return _rows(recipe_table.HEAD, *((f"`{site}`", *cells) for site, *cells in rows))


def linears(name: str) -> str:
    rows = recipe_table.product_rows(RECIPES[name])
    return _rows(recipe_table.PRODUCT_HEAD, *((f"`{own}`", *cells) for own, *cells in rows))


def formats() -> str:
    bits = ("bits", "of exponent", "of fraction")
    head = ("format", "kind", *bits, "smallest exponent", "largest", "overflow", "NaN")
    rows = (
        (
            f"`{f.name}`",
            f.kind,
            *map(str, (f.bits, f.exponent_bits, f.fraction_bits, f.smallest_exponent)),
            *(_code(_short(f.largest)), _code(f.overflow), _code(hex(f.nan))),
        )
        for f in FORMATS.values()
    )
    return _rows(head, *rows)


def _short(x: float) -> str:
    return f"{x:g}" if x < 2.0**17 else re.sub(r"\.?0+p", "p", x.hex())


def dtypes() -> str:
    def row(name: str) -> tuple[str, ...]:
        dtype = DTYPES[name]
        narrow = name == "BF16" or name.startswith("F8_")
        return f"`{name}`", str(dtype.codes.itemsize), "to float32" if narrow else "as it is"

    return _rows(("type", "bytes", "decoded"), *map(row, DTYPES))


def casts() -> str:
    def row(c: Any) -> tuple[str, ...]:
        codes = (f"`{code:#x}`" for code in (c.overflow, c.infinity, c.nan))
        sign = "kept" if c.nan_sign else "dropped"
        return f"`{c.behaviour}`", f"`{c.format}`", *codes, sign, f"`{c.widened_nan:#x}`"

    head = ("behaviour", "format", "finite overflow", "infinity", "NaN", "sign of a NaN", "NaN widened")
    return _rows(head, *map(row, CASTS.values()))


SCALES = {"divide": "RN(a / top)", "inverse": "RN(a RN(1 / top))"}
POWERS = {"": "", "bits": "up, by bits", "clamped": "up, by bits, clamped", "log2": "2^ceil(log2f s)"}
QUOTIENTS = {"divide": "RN(x / s)", "inverse": "RN(x RN(1 / s))", "div.full": "x / s of RCP-2"}


def quantisers() -> str:
    def row(q: Quantiser) -> tuple[str, ...]:
        a = "amax" if q.floor is None else f"max(amax, {q.floor:g})"
        quotient = QUOTIENTS[q.quotient] + (", then clamp" if q.clamp else "")
        steps = (a, q.nan, SCALES[q.scale], POWERS[q.power], quotient, f"`{q.cast}`")
        return f"`{q.name}`", "x".join(map(str, q.tile)), *steps, q.source

    head = ("recipe", "tile", "a", "NaN", "s", "power of two", "q", "cast", "whose")
    return _rows(head, *map(row, QUANTISERS.values()))


def edges() -> str:
    """Scale, then the codes of the first two elements, of tiles with an edge."""
    tiles = np.zeros((4, 128), np.float32)
    tiles[1:, 1] = 1.0
    tiles[0, 1] = -0.0
    tiles[1, 0], tiles[2, 0], tiles[3] = np.nan, np.inf, np.nan

    def row(name: str) -> tuple[str, ...]:
        made = quantise(tiles, name, ACTIVATION)
        pairs = zip(made.scales[:, 0], made.codes[:, :2], strict=True)
        shown = (f"`{_single(s)}`: `{codes[0]:02x}` `{codes[1]:02x}`" for s, codes in pairs)
        return f"`{name}`", *shown

    return _rows(("recipe", "0, -0", "NaN, 1", "inf, 1", "NaN only"), *map(row, QUANTISERS))


def _single(x: np.float32) -> str:
    power = np.isfinite(x) and x > 0 and np.frexp(x)[0] == 0.5
    return f"2^{int(np.frexp(x)[1]) - 1}" if power else f"{float(x):.9g}"


def units() -> str:
    def row(name: str, instructions: str, formats: str, unit: Unit) -> tuple[str, ...]:
        lowest = "none" if unit.lowest >= -126 else str(unit.lowest)
        numbers = map(str, (unit.products, unit.fraction, unit.kept))
        return name, instructions, formats, *numbers, lowest

    head = ("unit", "instructions", "operands", "products", "fraction", "kept", "lowest")
    return _rows(
        head,
        row("QGMMA", "`wgmma` m64nNk32", "E4M3 and E5M2 in any mix", QGMMA),
        row("HGMMA, HMMA", "`wgmma` m64nNk16, `mma.sync` m16n8k16", "BF16 or FP16", HMMA),
    )


def claims() -> str:
    def power(u: float) -> str:
        return f"2^{1 - u.as_integer_ratio()[1].bit_length()}"

    head = ("claim", "storage", "product", "accumulate", "bits of the significand", "lowest exponent")
    rows = ((f"`{c.name}`", *map(power, c.roundoffs), str(c.bits), str(c.lowest)) for c in CLAIMS.values())
    return _rows(head, *rows)


TABLES: dict[str, Callable[[], str]] = {
    "config": config,
    "training": training,
    "presets": presets,
    "profiles": profiles,
    "choices": choices,
    "sites": sites,
    **{f"recipe {name}": partial(recipe, name) for name in RECIPES},
    "linears v3-fp8": lambda: linears("v3-fp8"),
    "formats": formats,
    "casts": casts,
    "quantisers": quantisers,
    "edges": edges,
    "units": units,
    "dtypes": dtypes,
    "claims": claims,
}

if __name__ == "__main__":
    SPEC.write_text(written(SPEC.read_text("utf-8")), "utf-8")

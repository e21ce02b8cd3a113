"""The tables of SPEC.md that repeat what the code says.  `python tests/spec_tables.py` writes them anew."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from refimpl.cases.claims import CLAIMS
from refimpl.checkpoint.dtypes import DTYPES
from refimpl.config.choices import CHOICES, PROFILES, Choice, Choices
from refimpl.config.model import FAMILY_DEFAULTS, ModelConfig
from refimpl.config.presets import PRESETS, preset
from refimpl.config.rules import show
from refimpl.config.training import TrainingConfig
from refimpl.numerics.formats import FORMATS
from refimpl.numerics.recipe import RECIPES, SITES

SPEC = Path(__file__).parent.parent / "SPEC.md"
BLOCK = re.compile(r"(?<=^<!-- table: )([a-z0-9 ]+)( -->\n)(.*?)(?=^<!-- end -->$)", re.M | re.S)


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
    return [list(pair) for pair in value] if isinstance(value, tuple) else value


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
    rules = RECIPES[name].rules
    head = ("sites", "format", "evidence", "source")
    return _rows(head, *((f"`{r.site}`", r.format, r.evidence, r.source) for r in rules))


def formats() -> str:
    head = ("format", "exponent bits", "fraction bits", "smallest exponent", "largest", "overflow", "NaN")
    rows = (
        (
            f"`{f.name}`",
            *map(str, (f.exponent_bits, f.fraction_bits, f.smallest_exponent)),
            *(_code(f.largest.hex()), _code(f.overflow), _code(hex(f.nan))),
        )
        for f in FORMATS.values()
    )
    return _rows(head, *rows)


def dtypes() -> str:
    def row(name: str) -> tuple[str, ...]:
        dtype = DTYPES[name]
        decoded = "no" if dtype.decode is None else "to float32" if name == "BF16" else "as it is"
        return f"`{name}`", str(dtype.codes.itemsize), decoded

    return _rows(("type", "bytes", "decoded"), *map(row, DTYPES))


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
    "recipe bf16": lambda: recipe("bf16"),
    "formats": formats,
    "dtypes": dtypes,
    "claims": claims,
}

if __name__ == "__main__":
    SPEC.write_text(written(SPEC.read_text("utf-8")), "utf-8")

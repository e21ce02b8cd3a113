"""Every change that is planted in torch_v3.py, by name."""

import planted_attention
import planted_experts
from planted import Planted, pair
from planted_rewrites import REWRITES

KNOWN: tuple[Planted, ...] = (
    *planted_attention.ROTARY,
    *planted_attention.YARN,
    *planted_attention.LATENT,
    *planted_experts.ROUTING,
    *planted_experts.INPUT,
)
UNKNOWN: tuple[Planted, ...] = (*planted_attention.UNKNOWN, *planted_experts.UNKNOWN)
_BY_NAME = {p.name: p for p in KNOWN}
PAIRS: tuple[Planted, ...] = tuple(
    pair(_BY_NAME[first], _BY_NAME[second])
    for first, second in (
        ("R01", "Y07"),
        ("Y01", "Y09-once"),
        ("A05", "G13"),
        ("A07", "A01"),
        ("G01", "G12"),
        ("G05", "G21"),
        ("G18", "G15"),
    )
)
PLANTED: dict[str, Planted] = {p.name: p for p in (*KNOWN, *UNKNOWN, *PAIRS, *REWRITES)}

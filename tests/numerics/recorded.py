"""What an H100 computed, beside what the emulation computes: see recordings/h100/README.md."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

from refimpl.numerics import tensorcore
from refimpl.numerics.float32 import to_bf16
from refimpl.numerics.gemm import gemm_fp8

Tensors = dict[str, np.ndarray]
Comparison = tuple[str, np.ndarray, np.ndarray]  # name, computed bits, recorded bits


def load(folder: Path, name: str) -> tuple[Tensors, dict[str, Any]]:
    path = folder / f"{name}.safetensors"
    with safe_open(path, "np") as file:
        return load_file(path), json.loads(file.metadata()["json"])


def comparisons(folder: Path) -> Iterator[Comparison]:
    """All recorded products of a folder, whole or trimmed, in the recordings' layout."""
    yield from instructions(folder, "wgmma_fp8")
    yield from instructions(folder, "tc_bf16")
    yield from products(folder)


def instructions(folder: Path, name: str) -> Iterator[Comparison]:
    tensors, meta = load(folder, name)
    for group, info in meta["groups"].items():
        if group.startswith("torchmm"):
            found = tensorcore.wgmma_bf16(tensors[f"A_{group}"], tensors[f"B_{group}"])
            yield f"{group} fp32", found.view(np.uint32), tensors[f"D_{group}_f32"]
            yield f"{group} bf16", to_bf16(found), tensors[f"D_{group}_bf16"]
            continue
        for key in tensors:
            if key == f"D_{group}" or key.startswith(f"D_{group}_first"):
                yield key[2:], _computed(tensors, group, key, info), tensors[key]


def _computed(tensors: Tensors, group: str, key: str, info: dict[str, Any]) -> np.ndarray:
    a, b, c = tensors[f"A_{group}"], tensors[f"B_{group}"], tensors.get(f"C_{group}")
    k = int(key.split("_first")[1]) if "_first" in key else a.shape[-1]
    formats = [info["a"], info["b"]] if "a" in info else []
    kind = group if group in INSTRUCTIONS else "mma_fp8" if group.startswith("mmasync") else "wgmma_fp8"
    return np.stack(
        [
            INSTRUCTIONS[kind](
                a[t, :, :k], b[t, :, :k], None if c is None else c[t].view(np.float32), *formats
            )
            for t in range(len(a))
        ]
    ).view(np.uint32)


INSTRUCTIONS = {
    "wgmma_fp8": tensorcore.wgmma_fp8,
    "mma_fp8": tensorcore.mma_fp8,
    "wgmma_bf16": tensorcore.wgmma_bf16,
    "mma_bf16": tensorcore.mma_bf16,
    "mma_f16": tensorcore.mma_fp16,
}


def products(folder: Path) -> Iterator[Comparison]:
    tensors, meta = load(folder, "gemm")
    for case, info in meta["cases"].items():
        a, b = operands(tensors, case, info)
        sa, sb = (tensors[f"{case}_{name}"].view(np.float32) for name in ("sa", "sb"))
        rows, columns = info.get("rows", range(len(a))), info.get("columns", range(len(b)))
        given = a[rows], sa[rows], b[columns], sb[np.array(columns) // 128]  # a scale for every row of b
        for kernel in ("deepgemm", "triton_wgmma", "triton_mma"):
            found = gemm_fp8(*given, kernel)
            yield f"{case} {kernel}", found.view(np.uint32), tensors[f"{case}_{kernel}_f32"]
        if f"{case}_cublas_f32" in tensors:
            found = gemm_fp8(*given, "cublas", split=2)
            yield f"{case} cublas, 2 parts", found.view(np.uint32), tensors[f"{case}_cublas_f32"]
        if f"{case}_chain_nopromo_f32" in tensors:
            corner = [[i for i in index if i < 64] for index in (rows, columns)]
            yield from _one_scale(a[corner[0]], b[corner[1]], case, tensors)


def _one_scale(a: np.ndarray, b: np.ndarray, case: str, tensors: Tensors) -> Iterator[Comparison]:
    one = np.float32(1)
    chain = tensorcore.wgmma_fp8(a, b)
    yield f"{case} one chain", chain.view(np.uint32), tensors[f"{case}_chain_nopromo_f32"]
    for accumulation, split, key in (("fast", 2, "fast1"), ("blocks", 1, "fast0")):
        found = gemm_fp8(a, one, b, one, "cublas_tensor", accumulation=accumulation, split=split)
        recorded = tensors[f"{case}_cublas_pertensor_{key}_f32"]
        yield f"{case} cublas_tensor {accumulation}", found.view(np.uint32), recorded


def operands(tensors: Tensors, case: str, info: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Codes a (M, K) and b (N, K): stored, or made from a seed as they were for the recording."""
    if f"{case}_A" in tensors:
        return tensors[f"{case}_A"], tensors[f"{case}_B"]
    m, n, k = info["shape"]

    def made(seed: int, rows: int) -> np.ndarray:
        index = np.frombuffer(np.random.RandomState(seed).bytes(rows * k), np.uint8)
        return tensors["QT"][index].reshape(rows, k)

    return made(info["seed_a"], m), made(info["seed_b"], n)

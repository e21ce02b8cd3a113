"""What bench/determinism.py runs in every environment: exact results and plain ones, as digests, in JSON.

    python bench/determinism_load.py [--suites generator functions ...] [--points N]

`digests` are of exact results and must be the same everywhere.  `controls` are of plain NumPy on the same
machine; they show that the environment is another one indeed.  A digest is the SHA-256 of the little-endian
bytes of the arrays, with one NaN for all NaNs (their sign and payload are the processor's, not the result's).
The controls' inputs come from SHAKE-128, so that they do not depend on anything under test.
"""

import argparse
import ctypes
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module

import numpy as np

Digests = Iterator[tuple[str, str]]


def digest(*arrays: np.ndarray) -> str:
    sha = hashlib.sha256()
    for array in arrays:
        a = np.asarray(array)
        if a.dtype.kind == "f":
            a = np.where(np.isnan(a), np.asarray(np.nan, a.dtype), a)
        sha.update(f"{a.dtype.newbyteorder('<').str}{a.shape}".encode())
        sha.update(np.ascontiguousarray(a, a.dtype.newbyteorder("<")).tobytes())
    return sha.hexdigest()


def raw(name: str, count: int) -> np.ndarray:
    """uint64 (count,): SHAKE-128 of a name."""
    return np.frombuffer(hashlib.shake_128(name.encode()).digest(8 * count), "<u8").astype(np.uint64)


def signed(name: str, *shape: int) -> np.ndarray:
    """float64 in [-1, 1), 53 significant bits."""
    words = raw(name, int(np.prod(shape)))
    return ((words >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0).reshape(shape)


# ---- the controls: what plain NumPy makes of the same numbers here ----


def controls() -> Digests:
    a, b, v = signed("a", 257, 1031), signed("b", 1031, 129), signed("v", 100_003)
    yield "f64 @", digest(a @ b)
    yield "f32 @", digest(a.astype(np.float32) @ b.astype(np.float32))
    yield "dot", digest(v @ v[::-1].copy())
    yield "exp", digest(np.exp(v * 700))
    yield "log", digest(np.log(np.abs(v) + 1e-9))
    yield "sin", digest(np.sin(v * 1000))
    yield "f32 exp", digest(np.exp((v * 80).astype(np.float32)))
    yield "sum", digest(v.sum(), a.sum(0), a.sum(1))


# ---- the exact results ----


def generator(points: int) -> Digests:
    from refimpl.numerics import generator as g

    key = g.tensor_key(3, "determinism")
    yield "words", digest(g.words(key, 0, points), g.words(key, 2**40 + 3, 1001))
    yield "tensor", digest(g.tensor(3, "t", (points,), 2.0**-8), g.tensor(3, "t", (points,), 0.5, fields=3))
    yield "integers", digest(g.integers(3, "i", (points,), -7, 10**6))
    yield "permutation", digest(g.permutation(3, "p", points))


def functions(points: int) -> Digests:
    """Every function on random bit patterns (all exponents, infinities, NaNs) and where it is used."""
    from refimpl.numerics import functions as f

    anything = raw("bits", points).view(np.float64)
    usual = signed("usual", points)
    near = {"exp": usual * 750, "log": np.ldexp(1.5 + usual / 2, np.rint(usual * 60).astype(np.int32))}
    for name in ("exp", "log", "sin", "cos"):
        with np.errstate(all="ignore"):
            call = getattr(f, name)
            yield name, digest(call(anything), call(near.get(name, usual * 3000)))


def contractions(points: int) -> Digests:
    """Contractions of ordinary, ill-conditioned, few-bit and non-finite operands, and the sums."""
    from refimpl.numerics import contraction as c

    m, k, n = 48, max(64, points // 20), 40
    a, b = signed("ca", m, k), signed("cb", n, k)
    yield "contract", digest(c.contract(a, b))
    wide_a = np.ldexp(a, (raw("ea", m * k) % np.uint64(80)).astype(np.int32).reshape(m, k) - 40)
    wide_b = np.ldexp(b, (raw("eb", n * k) % np.uint64(80)).astype(np.int32).reshape(n, k) - 40)
    yield "contract, wide exponents", digest(c.contract(wide_a, wide_b))
    cancelling = np.concatenate([wide_a, -wide_a, a[:, :8]], axis=1)
    yield (
        "contract, cancelling",
        digest(c.contract(cancelling, np.concatenate([wide_b, wide_b, b[:, :8]], 1))),
    )
    short = np.rint(a * 128) / 128, np.rint(b * 128) / 128
    yield "contract, few bits", digest(c.contract(*short))
    odd = a.copy()
    odd[0, 0], odd[1, 1], odd[2, 2], odd[3] = np.inf, np.nan, -np.inf, 0.0
    with np.errstate(all="ignore"):
        yield "contract, non-finite", digest(c.contract(odd, b))
    yield "contract, batched", digest(c.contract(a.reshape(4, -1, k), np.stack([b] * 4)))
    yield "dot", digest(c.dot(wide_a, wide_a[::-1]), c.dot(a[:n], b))
    yield "sum", digest(c.sum_(wide_a), c.sum_(a, axis=0))
    yield "mean", digest(c.mean(wide_a), c.mean(a, axis=0))
    ids = (raw("ids", k) % np.uint64(7)).astype(np.int64)
    yield "segment_sum", digest(c.segment_sum(np.ascontiguousarray(wide_a.T), ids, 9))


def model(points: int) -> Digests:
    """Small whole models, forward and backward: logits, loss, every named tensor and every gradient."""
    import refimpl

    for preset in ("tiny-v3", "tiny-v2"):
        for precision in ("exact", "bf16"):
            net = refimpl.load(preset, precision=precision)
            ids = (
                (raw(f"{preset}/ids", 2 * 12) % np.uint64(net.config.vocab_size))
                .astype(np.int64)
                .reshape(2, 12)
            )
            result = net.forward(ids, labels=ids)
            grads = net.backward(result)
            what = f"{preset} {precision}"
            yield f"{what}, loss and logits", digest(np.asarray(result.loss), result.logits)
            yield f"{what}, tensors", digest(*(np.asarray(result.tensors[n]) for n in sorted(result.tensors)))
            yield f"{what}, gradients", digest(*(np.asarray(grads[n]) for n in sorted(grads)))


def golden(points: int) -> Digests:
    """Every golden case, computed anew, a digest per suite: case.json, which has the SHA-256 of its tensors,
    and the bounds that judge them.  Which case differs, if one does, `refimpl golden verify` tells."""
    from refimpl.cases.build import build
    from refimpl.cases.suites import SUITES as NAMES
    from refimpl.cases.suites import suite

    for name in NAMES:
        built = [build(definition) for definition in suite(name)]
        texts = [np.frombuffer(b.case.to_json().encode(), np.uint8) for b in built]
        bounds = [np.asarray(b.extras[key]) for b in built for key in sorted(b.extras)]
        yield f"{name} ({len(built)} cases)", digest(*texts, *bounds)


SUITES: dict[str, Callable[[int], Digests]] = {
    "generator": generator,
    "functions": functions,
    "contractions": contractions,
    "model": model,
    "golden": golden,
}


# ---- what runs here ----


def blas_kernel() -> str:
    """The kernel that OpenBLAS really chose; it silently falls back from names that it does not have."""
    library = ctypes.CDLL(import_module("numpy._core._multiarray_umath").__file__)
    for name in ("scipy_openblas_get_corename64_", "scipy_openblas_get_corename", "openblas_get_corename"):
        if hasattr(library, name):
            ask = getattr(library, name)
            ask.restype = ctypes.c_char_p
            return ask().decode()
    return "unknown"


def simd() -> list[str]:
    """The SIMD levels beyond the baseline that NumPy found and was not told to leave alone."""
    umath = import_module("numpy._core._multiarray_umath")
    return [f for f in umath.__cpu_dispatch__ if umath.__cpu_features__[f]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--suites", nargs="*", default=[s for s in SUITES if s != "golden"], choices=list(SUITES)
    )
    parser.add_argument("--points", type=int, default=20_000)
    options = parser.parse_args()
    start = time.perf_counter()
    print(
        json.dumps(
            {
                "machine": platform.machine(),
                "python": platform.python_version(),
                "numpy": np.__version__,
                "kernel": blas_kernel(),
                "threads": int(os.environ.get("OPENBLAS_NUM_THREADS", "0")),
                "simd": simd(),
                "controls": dict(controls()),
                "digests": {
                    f"{suite}: {name}": value
                    for suite in options.suites
                    for name, value in SUITES[suite](options.points)
                },
                "seconds": round(time.perf_counter() - start, 1),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    sys.exit(main())

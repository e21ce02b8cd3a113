"""What the package may import, and what it may not call."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "refimpl"

# From the top down; a layer imports itself and what stands below it.  So checkpoint may
# read configurations, and layers both.
ORDER = (
    "cli",
    "validate",
    "cases",
    "variants",
    "programs",
    "pipeline",
    "decoding",
    "training",
    "model",
    "layers",
    "accounting",
    "checkpoint",
    "config",
    "numerics",
    "errors",
)
MODEL = ("model", "units", "losses", "inputs", "parameters", "prepared")  # the modules of the layer `model`
PROGRAMS = (
    "programs",
    "setting",
    "training_programs",
    "recipe_programs",
    "pipeline_programs",
)  # those of the layer `programs`
ROOTS = ("__init__", "__main__")  # the package's own face, above everything

TOP = {name: i for i, name in enumerate(ORDER)}


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Outside of numerics these would tie bits to a platform, or round where no site is.
BANNED = words(
    "exp exp2 expm1 log log2 log10 log1p sin cos tan sinh cosh tanh arcsin arccos arctan arctan2 sinc power "
    "float_power cbrt hypot sum nansum cumsum mean nanmean average std var prod cumprod trace dot vdot "
    "vecdot inner outer matmul matvec vecmat tensordot einsum einsum_path kron convolve correlate interp "
    "logaddexp add.reduce add.at random linalg fft load loads fromfile memmap longdouble vectorize"
)
# Of Python's math: they are the C library's.  What is not here is exact, or IEEE's (sqrt).
MATH = words(
    "exp exp2 expm1 log log2 log10 log1p sin cos tan sinh cosh tanh asin acos atan atan2 pow cbrt hypot erf "
    "erfc gamma lgamma fsum sumprod"
)
METHODS = words("sum mean std var prod cumsum cumprod dot trace")
NEVER_NAMES = frozenset({"eval", "exec", "compile", "__import__"})
NEVER_IMPORTS = frozenset({"pickle", "marshal", "shelve", "dill", "joblib", "random", "subprocess"})
RUNS_PROGRAMS = "validate/running.py"  # the one file that may start a process: a port

_COUNTS = "counts truth values: integers, exact in any order"
_LOADS = "loads: integers, exact in any order"
_SHAPE = "the number of elements of a shape: integers"

# File -> the call -> why it is allowed there.
ALLOWED: dict[str, dict[str, str]] = {
    "cases/fingerprints.py": {"np.cumsum": _SHAPE},
    "cases/folder.py": {"np.prod": _SHAPE},
    "cases/format.py": {"np.prod": _SHAPE},
    "cases/noise.py": {"np.prod": _SHAPE},
    "programs.py": {".sum": _COUNTS},
    "layers/balance.py": {".sum": _LOADS},
    "training/loads.py": {".sum": _LOADS},
    "training/bias.py": {".sum": _LOADS},
    "training/curve.py": {".sum": _LOADS},
    "cases/claims.py": {"math.log2": "the bits of a claim, a whole number far from a tie"},
    "cases/definition.py": {"math.log2": "the nearest power of two, a whole number far from a tie"},
}
MEASURING = {  # these compute no golden value
    "cases/judge.py": "errors of a port are measured in float64",
    "cases/judging.py": "errors of a port are measured in float64",
    "cases/build.py": "counts of rows, and the median margin as it is shown",
    "validate/evidence.py": "errors of a port are measured in float64",
    "validate/closeness.py": "errors of a port are measured in float64",
    "validate/findings.py": "errors of a port are described in float64",
    "validate/reentry.py": "errors of a port are measured in float64",
    "validate/candidates.py": "errors of a port are measured in float64",
    "validate/jitter.py": "an arithmetic on BLAS, whose runs measure errors",
    "validate/diagnosis.py": "how many times closer, as it is shown",
}


@cache
def files() -> tuple[Path, ...]:
    return tuple(sorted(PACKAGE.rglob("*.py")))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def layer(module: str) -> str | None:
    """The layer of `refimpl.x.y`; None for the package's own face."""
    parts = module.split(".")
    if len(parts) == 1 or parts[1] in ROOTS:
        return None
    if parts[1] in PROGRAMS:
        return "programs"
    return "model" if parts[1] in MODEL else parts[1]


def module_of(path: Path) -> str:
    parts = ("refimpl", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, also inside of functions; names that are modules count as such."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)} imports relatively"
            assert node.module is not None
            for alias in node.names:
                inner = PACKAGE.joinpath(*f"{node.module}.{alias.name}".split(".")[1:])
                own = node.module.startswith("refimpl") and (
                    inner.is_dir() or inner.with_suffix(".py").exists()
                )
                yield f"{node.module}.{alias.name}" if own else node.module


def dotted(node: ast.expr) -> str:
    """`np.add.reduce` of an attribute chain; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr}" if head else ""
    return ""


def _exact_power(node: ast.BinOp) -> bool:
    """A square, a power of the constant 2, or of integers: the others are the C library's."""
    exponent, base = node.right, node.left
    known = [part.value for part in (base, exponent) if isinstance(part, ast.Constant)]
    square = isinstance(exponent, ast.Constant) and exponent.value == 2
    integers = len(known) == 2 and all(isinstance(value, int) for value in known)
    return square or integers or (isinstance(base, ast.Constant) and base.value == 2)


def offences(path: Path) -> Iterator[tuple[str, int]]:
    """(what, line) of everything on the ban list."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            yield "@", node.lineno
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and not _exact_power(node):
            yield "**", node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module in ("numpy", "math"):
            for alias in node.names:
                if alias.name in (MATH if node.module == "math" else BANNED):
                    yield f"{node.module}.{alias.name}", node.lineno
        elif isinstance(node, ast.Attribute):
            name = dotted(node)
            root, _, rest = name.partition(".")
            if root in ("np", "numpy", "scipy", "special") and (
                rest in BANNED or rest.partition(".")[0] in BANNED
            ):
                yield name, node.lineno
            elif root == "math":
                if rest in MATH:
                    yield name, node.lineno
            elif node.attr in METHODS and root not in ("ar", "c", "self"):
                yield f".{node.attr}", node.lineno
        elif isinstance(node, ast.Call) and dotted(node.func) in ("sum", "pow") and "layers" in path.parts:
            yield f"{dotted(node.func)}()", node.lineno  # Python's own sum of floats changed in 3.12


@pytest.mark.parametrize("path", files(), ids=relative)
def test_imports_point_downwards(path: Path) -> None:
    own = layer(module_of(path))
    for name in imports(path):
        other = layer(name) if name.partition(".")[0] == "refimpl" else None
        if name.partition(".")[0] != "refimpl" or own is None:
            continue
        if other is None:
            assert name == "refimpl.__init__" or own == "cli", f"{relative(path)} imports {name}"
            continue
        assert TOP[own] <= TOP[other], f"{relative(path)} ({own}) imports {name} ({other})"


def test_every_module_belongs_to_a_layer() -> None:
    for path in files():
        own = layer(module_of(path))
        assert own is None or own in TOP, relative(path)


@pytest.mark.parametrize("path", files(), ids=relative)
def test_nothing_platform_dependent_outside_of_numerics(path: Path) -> None:
    name = relative(path)
    if name.startswith("numerics/") or name in MEASURING:
        return
    allowed = ALLOWED.get(name, {})
    found = [f"{what} in line {line}" for what, line in offences(path) if what not in allowed]
    assert not found, f"{name}: {', '.join(found)}"


@pytest.mark.parametrize(
    "line",
    [
        "y = a @ b",
        "y = np.exp(x)",
        "y = np.linalg.norm(x)",
        "y = np.add.reduce(x)",
        "y = x.sum(-1)",
        "y = (x * x).mean()",
        "y = f(x).std()",
        "y = x ** 0.5",
        "y = math.log(x)",
        "from math import exp",
        "from numpy import einsum",
        "y = np.random.default_rng(0)",
    ],
)
def test_the_ban_sees(line: str, tmp_path: Path) -> None:
    path = tmp_path / "layer.py"
    path.write_text(line)
    assert any(offences(path))


@pytest.mark.parametrize(
    "line",
    ["y = ar.sum(x)", "y = c.ar.mean(x)", "y = x ** 2", "y = 2.0**-7", "y = math.prod(x)", "y = np.sqrt(x)"],
)
def test_the_ban_lets_pass(line: str, tmp_path: Path) -> None:
    path = tmp_path / "layer.py"
    path.write_text(line)
    assert not any(offences(path))


def test_exceptions_are_still_needed() -> None:
    present = {relative(path): path for path in files()}
    for name, calls in ALLOWED.items():
        found = {what for what, _ in offences(present[name])}
        assert set(calls) <= found, name
    for name in MEASURING:
        assert any(offences(present[name])), name


@pytest.mark.parametrize("path", files(), ids=relative)
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    for name in imports(path):
        if (relative(path), name) != (RUNS_PROGRAMS, "subprocess"):
            assert name.partition(".")[0] not in NEVER_IMPORTS, name
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            assert called not in NEVER_NAMES, f"{called} in line {node.lineno}"
            assert called not in ("np.load", "numpy.load"), f"{called} in line {node.lineno}"


@pytest.mark.parametrize("path", files(), ids=relative)
def test_files_are_about_one_thing(path: Path) -> None:
    lines = len(path.read_text("utf-8").splitlines())
    assert lines <= 400, f"{relative(path)} has {lines} lines"


@pytest.mark.parametrize("path", files(), ids=relative)
def test_modules_say_what_they_are(path: Path) -> None:
    text = path.read_text("utf-8")
    assert not text.strip() or ast.get_docstring(tree(path)), f"{relative(path)} has no docstring"


def test_layers_name_no_number_type_and_draw_no_random_numbers() -> None:
    for path in files():
        if relative(path).startswith("layers/"):
            names = {dotted(node) for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
            assert not names & {"np.float32", "np.float16", "np.longdouble"}, relative(path)
            assert not any(".generator" in name for name in imports(path)), relative(path)

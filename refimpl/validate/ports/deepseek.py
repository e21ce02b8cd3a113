"""DeepSeek's own inference code, `inference/model.py` of deepseek-ai/DeepSeek-V3, as a port.  SPEC VERDICT-1.

    python -m refimpl.validate.ports.deepseek CASE_DIR OUTPUT.safetensors --checkout DIR
        [--dtype bfloat16|float32] [--attention absorb|naive] [--backward]

The folder is that of a checkout; without the option it is that in REFIMPL_DEEPSEEK_V3.  Its modules run
unchanged on the CPU.  It is inference code and claims no gradients; with --backward autograd runs through it
all the same.  Added are:

- `kernel`, the Triton kernels of FP8, is a stub: weights that are not FP8 never call it;
- its gate has a selection bias only if its width is 7168: elsewhere the bias is attached;
- its `Transformer.forward` gives the last position's logits without autograd, so its embedding, layers, norm
  and head are called one after another, and the loss, which it lacks, is PyTorch's of its logits;
- sequences with different positions or masks run one by one: it has one table and one mask for all;
- for routed experts alone its MoE runs with the given routing and shared experts that give zero.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from refimpl.numerics.arithmetic import Array
from refimpl.validate.given import NotForMe, PortCase
from refimpl.validate.ports.agreement import model_cases
from refimpl.validate.ports.command import Adapter
from refimpl.validate.ports.deepseek_code import (
    CHECKOUT,
    arguments,
    below,
    expressible,
    ours,
    source,
)
from refimpl.validate.ports.trial import BIAS, DTYPES, Trial

ATTENTION: Final = ("absorb", "naive")


def run(case: PortCase) -> dict[str, Array]:
    """One case, with the options of the environment.  Raises NotForMe, Missing, Unreadable."""
    return ADAPTER.module(case)


def outputs(
    case: PortCase,
    dtype: str = "bfloat16",
    attention: str = "absorb",
    checkout: str | None = None,
    backward: bool = False,
) -> dict[str, Array]:
    """name -> array, by the names of case.json.  Raises NotForMe, Missing, Unreadable."""
    model_cases(case)
    if case.component not in COMPONENTS:
        raise NotForMe(f"DeepSeek's code has no module of its own for the component {case.component}")
    if case.backward and not backward:
        raise NotForMe("DeepSeek's code is for inference; --backward runs autograd through it")
    trial = Trial(case, dtype)
    trial.score_axes = (0, 2, 1, 3)
    expressible(case, trial.config)
    demo = Demo(trial, source(checkout or os.environ.get(CHECKOUT, "")), attention)
    kept = trial.torch.get_default_dtype()
    trial.torch.set_default_dtype(trial.dtype)  # as its generate.py does
    try:
        with trial.intercepted(demo.functions), demo.noting_rotations():
            COMPONENTS[case.component](demo)
    finally:
        trial.torch.set_default_dtype(kept)
    return trial.arrays()


class Demo:
    """Its classes, with the arguments that the case's configuration gives."""

    def __init__(self, trial: Trial, code: Any, attention: str) -> None:
        self.trial, self.torch, self.code = trial, trial.torch, code
        code.attn_impl = attention
        code.Linear.dtype = trial.dtype
        self.args = arguments(code, trial, trial.extent[1])

    def angles(self, positions: Any) -> Any:
        """Rows of its table, which it makes for all positions up to the longest."""
        whole = arguments(self.code, self.trial, max(self.trial.longest, self.args.max_seq_len))
        whole.original_seq_len = self.args.original_seq_len
        if whole.original_seq_len == self.args.max_seq_len:  # YaRN does not apply
            whole.original_seq_len = whole.max_seq_len
        return self.code.precompute_freqs_cis(whole)[positions]

    def placed(self, module: Any, path: str) -> Any:
        """A module with the weights that the case has below a path, in the case's number type."""
        for name, part in module.named_modules():
            bias = f"{below(path, ours(name))}.{BIAS}"
            if isinstance(part, self.code.Gate):
                given = self.trial.weight(bias) if bias in self.trial.weights else None
                part.bias = None if given is None else self.torch.nn.Parameter(given)
        self.trial.load(module, lambda key: below(path, ours(key)))
        self.trial.watch(module, lambda name: below(path, ours(name)), _shown)
        return module

    def attended(self, module: Any, call: Callable[[Any, Any, Any], Any], x: Any) -> Any:
        """`call(x, freqs_cis, mask)` for all sequences at once, or one by one."""
        size, length = x.shape[:2]
        positions, seen = self.trial.positions(size, length), self.trial.allowed(size, length)
        alike = bool((positions == positions[:1]).all()) and bool((seen == seen[:1]).all())
        rows = [slice(None)] if alike else [slice(row, row + 1) for row in range(size)]
        parts = []
        for row, which in enumerate(rows):
            self._forget(module)
            mask = self.torch.zeros(length, length).masked_fill(~seen[which][0, 0], float("-inf"))
            if alike:
                return call(x, self.angles(positions[0]), mask)
            with self.trial.row(row, length):
                parts.append(call(x[which], self.angles(positions[row]), mask))
        return self.torch.cat(parts)

    def _forget(self, module: Any) -> None:
        """Empty caches, which would tie the graphs of two calls together."""
        for part in module.modules():
            for name, cache in part.named_buffers(recurse=False):
                if name.endswith("_cache"):
                    setattr(part, name, self.torch.zeros_like(cache))

    @contextmanager
    def noting_rotations(self) -> Iterator[None]:
        """Note what its function for rotary positions gives: for queries, then for keys, of each layer."""
        rotate: Callable[..., Any] = self.code.apply_rotary_emb
        calls = [0]

        def noting(x: Any, freqs_cis: Any) -> Any:
            y = rotate(x, freqs_cis)
            name = ("q_pe", "k_pe")[calls[0] % 2]
            calls[0] += 1
            self.trial.record(f"{self.trial.inside('self_attn')}.{name}", y)
            return y

        self.code.apply_rotary_emb = noting
        try:
            yield
        finally:
            self.code.apply_rotary_emb = rotate

    def _without_epsilon(self, chosen: Any) -> Any:
        """The scores that its gate normalises, unless the epsilon of the case, which it lacks, would show."""
        epsilon = self.trial.case.choices["topk_norm_epsilon"]
        if (
            self.trial.config.norm_topk_prob
            and (self.torch.sum(chosen.float(), -1) < 2.0**24 * epsilon).any()
        ):
            raise NotForMe(
                f"the case has topk_norm_epsilon = {epsilon}, and DeepSeek's code computes with 0.0"
            )
        return chosen

    def functions(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What the trial intercepts, frequencies of the table, and the scores that the gate normalises."""
        if function is self.torch.outer:
            self.trial.record(f"{self.trial.path}.inv_freq", args[1])
        if function is self.torch.Tensor.gather and self.trial.inside("gate") is not None:
            return self._without_epsilon(function(*args, **kwargs))
        return self.trial.functions(function, args, kwargs)


def _shown(path: str, arguments: Sequence[Any], output: Any) -> Iterable[tuple[str, Any]]:
    above, _, leaf = path.rpartition(".")
    if leaf == "gate":
        weight, idx = output
        yield from ((f"{path}.topk_idx", idx), (f"{path}.topk_weight", weight))
        return
    if leaf in ("down_proj", "o_proj"):
        yield f"{above}.{'act' if leaf == 'down_proj' else 'heads'}", arguments[0]
    yield path, output


def _finish(demo: Demo, y: Any) -> None:
    demo.trial.finish([y], [demo.trial.cotangent("dy", y)] if demo.trial.backward else [])


def _linear(demo: Demo) -> None:
    rows, columns = demo.trial.weights[f"{demo.trial.path}.weight"].shape
    _finish(demo, demo.placed(demo.code.Linear(columns, rows), demo.trial.path)(demo.trial.number("x")))


def _embedding(demo: Demo) -> None:
    size = demo.trial.weights[f"{demo.trial.path}.weight"].shape
    embedding = demo.placed(demo.code.ParallelEmbedding(*size), demo.trial.path)
    _finish(demo, embedding(demo.trial.integer("ids")))


def _norm(demo: Demo) -> None:
    trial = demo.trial
    (width,) = trial.weights[f"{trial.path}.weight"].shape
    norm = demo.placed(demo.code.RMSNorm(width, trial.case.arguments["eps"]), trial.path)
    _finish(demo, norm(trial.number("x")))


def _mlp(demo: Demo) -> None:
    path = demo.trial.path
    width, columns = demo.trial.weights[f"{path}.gate_proj.weight"].shape
    kind = demo.code.Expert if ".experts." in path else demo.code.MLP
    _finish(demo, demo.placed(kind(columns, width), path)(demo.trial.number("x")))


def _rope_tables(demo: Demo) -> None:
    trial = demo.trial
    table = demo.angles(trial.integer("position_ids"))
    scale = demo.torch.tensor([demo.code.MLA(demo.args).softmax_scale], dtype=demo.torch.float64)
    parts = {"cos": table.real, "sin": table.imag, "softmax_scale": scale}
    for name, value in parts.items():
        trial.record(f"{trial.path}.{name}", value)


def _rope(demo: Demo) -> None:
    trial, names = demo.trial, ("q_pe", "k_pe")
    table = demo.angles(trial.integer("position_ids"))
    rotated = [demo.code.apply_rotary_emb(trial.number(name)[None], table)[0] for name in names]
    for name, value in zip(names, rotated, strict=True):
        trial.record(f"{trial.path}.{name}", value)
    if trial.backward:
        trial.finish(rotated, [trial.cotangent(f"d{n}", y) for n, y in zip(names, rotated, strict=True)])


def _mla(demo: Demo) -> None:
    mla = demo.placed(demo.code.MLA(demo.args), demo.trial.path)
    _finish(demo, demo.attended(mla, lambda x, angles, mask: mla(x, 0, angles, mask), demo.trial.number("x")))


def _gate(demo: Demo) -> None:
    weight, _ = demo.placed(demo.code.Gate(demo.args), demo.trial.path)(demo.trial.number("x"))
    _finish(demo, weight)


def _experts(demo: Demo) -> None:
    trial, nn = demo.trial, demo.torch.nn
    moe = demo.code.MoE(demo.args)
    weight, idx = trial.number("topk_weight"), trial.integer("topk_idx")
    moe.gate, moe.shared_experts = nn.Module(), nn.Module()
    moe.gate.forward = lambda x: (weight, idx)
    moe.shared_experts.forward = demo.torch.zeros_like
    trial.load(moe, lambda key: below(trial.path.removesuffix(".experts"), ours(key)))
    y = moe(trial.number("x"))
    trial.record(trial.path, y)
    _finish(demo, y)


def _moe(demo: Demo) -> None:
    _finish(demo, demo.placed(demo.code.MoE(demo.args), demo.trial.path)(demo.trial.number("x")))


def _block(demo: Demo) -> None:
    trial = demo.trial
    block = demo.placed(demo.code.Block(trial.case.arguments["layer"], demo.args), trial.path)
    y = demo.attended(block, lambda x, angles, mask: block(x, 0, angles, mask), trial.number("x"))
    trial.record(trial.path, y)
    _finish(demo, y)


def _head_loss(demo: Demo) -> None:
    args, code = demo.args, demo.code
    norm = demo.placed(code.RMSNorm(args.dim), "model.norm")
    head = demo.placed(code.ColumnParallelLinear(args.dim, args.vocab_size), "lm_head")
    logits = head(norm(demo.trial.number("x")))
    if demo.trial.backward:
        logits.retain_grad()
    loss = _loss(demo, logits, demo.trial.integer("targets"))
    demo.trial.finish([loss], [None])
    demo.trial.record("grad.logits", logits.grad)


def _loss(demo: Demo, logits: Any, targets: Any) -> Any:
    """PyTorch's, of its logits: its code has none."""
    flat = logits.float().reshape(-1, logits.shape[-1])
    loss = demo.torch.nn.functional.cross_entropy(flat, targets.reshape(-1), ignore_index=-100)
    demo.trial.record("logits", logits)
    demo.trial.record("loss", loss)
    return loss


def _model(demo: Demo) -> None:
    trial, code = demo.trial, demo.code
    model = demo.placed(code.Transformer(demo.args), "")

    def layers(h: Any, angles: Any, mask: Any) -> Any:
        for layer in model.layers:
            h = layer(h, 0, angles, mask)
        return h

    h = demo.attended(model, layers, model.embed(trial.integer("input_ids")))
    logits = model.head(model.norm(h))
    targets = trial.targets
    loss = None if targets is None else _loss(demo, logits, targets)
    trial.record("logits", logits)
    trial.finish(*trial.starts(loss))


COMPONENTS: Final[Mapping[str, Callable[[Demo], None]]] = {
    "linear": _linear,
    "embedding": _embedding,
    "norm": _norm,
    "rope_tables": _rope_tables,
    "rope": _rope,
    "mla": _mla,
    "mlp": _mlp,
    "gate": _gate,
    "experts": _experts,
    "moe": _moe,
    "block": _block,
    "head_loss": _head_loss,
    "model": _model,
}


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkout", metavar="DIR")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--attention", choices=ATTENTION, default="absorb")
    parser.add_argument("--backward", action="store_true")


def _run(case: PortCase, given: argparse.Namespace) -> dict[str, Array]:
    return outputs(case, given.dtype, given.attention, given.checkout, given.backward)


ADAPTER: Final = Adapter(str(__doc__), _options, _run)

if __name__ == "__main__":
    sys.exit(ADAPTER.main())

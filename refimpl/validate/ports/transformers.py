"""transformers' DeepseekV3, and DeepseekV2 for V2's cases, as a port.  SPEC VERDICT-1.

    python -m refimpl.validate.ports.transformers CASE_DIR OUTPUT.safetensors
        [--dtype float32|bfloat16] [--attention eager|sdpa] [--experts eager|grouped_mm|batched_mm]

Its own modules compute everything: norms, rotary embedding, attention, router, experts, decoder layer, the
causal model with its loss, and autograd.  Only masks of packed sequences and their positions are made here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

from refimpl.numerics.arithmetic import Array
from refimpl.validate.given import NotForMe, PortCase
from refimpl.validate.ports.agreement import model_cases
from refimpl.validate.ports.command import Adapter
from refimpl.validate.ports.transformers_library import Library
from refimpl.validate.ports.trial import DTYPES, Trial, library

ATTENTION: Final = ("eager", "sdpa")
EXPERTS: Final = ("eager", "grouped_mm", "batched_mm")


def run(case: PortCase) -> dict[str, Array]:
    """One case, with the options of the environment.  Raises NotForMe, Missing, Invalid."""
    return ADAPTER.module(case)


def outputs(
    case: PortCase, dtype: str = "float32", attention: str = "eager", experts: str = "grouped_mm"
) -> dict[str, Array]:
    """name -> array, by the names of case.json.  Raises NotForMe, Missing, Invalid."""
    model_cases(case)
    if case.component not in COMPONENTS:
        raise NotForMe(f"transformers has no module for the component {case.component}")
    trial = Trial(case, dtype)
    model = Library(trial, attention, experts)
    with trial.intercepted(trial.functions), model.noting_rotations():
        COMPONENTS[case.component](model)
    return trial.arrays()


def _layer(path: str) -> int:
    return int(path.split(".")[2])


def _rotary_of(model: Library, hidden: Any) -> Any:
    return model.rotary()(hidden, model.trial.positions(*hidden.shape[:2]))


def _simple(model: Library, module: Any, x: Any) -> None:
    """A module that is a function of one tensor."""
    trial = model.trial
    y = model.placed(module, trial.path)(x)
    trial.finish([y], [trial.cotangent("dy", y)] if trial.backward else [])


def _linear(model: Library) -> None:
    rows, columns = model.trial.weights[f"{model.trial.path}.weight"].shape
    linear = model.torch.nn.Linear(columns, rows, bias=False, device="meta")
    _simple(model, linear, model.trial.number("x"))


def _embedding(model: Library) -> None:
    size = model.trial.weights[f"{model.trial.path}.weight"].shape
    embedding = model.torch.nn.Embedding(*size, model.config.pad_token_id, device="meta")
    _simple(model, embedding, model.trial.integer("ids"))


def _norm(model: Library) -> None:
    trial = model.trial
    (width,) = trial.weights[f"{trial.path}.weight"].shape
    _simple(model, model.part("RMSNorm", width, eps=trial.case.arguments["eps"]), trial.number("x"))


def _mlp(model: Library) -> None:
    trial = model.trial
    width = trial.weights[f"{trial.path}.gate_proj.weight"].shape[0]
    _simple(model, model.part("MLP", model.config, intermediate_size=width), trial.number("x"))


def _rope_tables(model: Library) -> None:
    trial, rotary = model.trial, model.rotary()
    ids = trial.integer("position_ids")
    tables = rotary(model.torch.empty(0, dtype=trial.dtype), ids[None])
    half = trial.config.qk_rope_head_dim // 2
    cos, sin = (tables.real, tables.imag) if model.v2 else (part[..., :half] for part in tables)
    scale = model.part("Attention", model.config, _layer(trial.path)).scaling
    parts = {"inv_freq": rotary.inv_freq, "cos": cos[0], "sin": sin[0]}
    parts["softmax_scale"] = model.torch.tensor([scale])
    for name, value in parts.items():
        trial.record(f"{trial.path}.{name}", value)


def _rope(model: Library) -> None:
    trial = model.trial
    names, halves = ("q_pe", "k_pe"), not model.v2
    heads = [trial.number(name).transpose(0, 1)[None] for name in names]  # (1, H, T, R)
    tables = model.rotary()(heads[0], trial.integer("position_ids")[None])
    if model.v2:
        both = model.modeling.apply_rotary_emb(*heads, tables)
    elif model.config.rope_interleave:
        both = model.modeling.apply_rotary_pos_emb_interleave(*heads, *tables)
    else:
        both = model.modeling.apply_rotary_pos_emb(*heads, *tables)
    rotated = [part[0].transpose(0, 1) for part in both]
    for name, value in zip(names, rotated, strict=True):
        trial.record(f"{trial.path}.{name}", value)
    if trial.backward:
        cotangents = [trial.cotangent(f"d{name}", y) for name, y in zip(names, rotated, strict=True)]
        if halves and model.config.rope_interleave:  # neighbours go in, halves come out
            cotangents = [model.torch.cat([dy[..., 0::2], dy[..., 1::2]], -1) for dy in cotangents]
        trial.finish(rotated, cotangents)


def _attention(model: Library) -> None:
    trial = model.trial
    module = model.part("Attention", model.config, _layer(trial.path)).eval()
    query, key, value = (trial.number(name) for name in ("query", "key", "value"))
    functions = library("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
    attend = functions.get_interface(
        model.config._attn_implementation, model.modeling.eager_attention_forward
    )
    mask = model.mask(query.transpose(1, 2)[..., 0])
    with trial.entered(trial.path):
        y, _ = attend(module, query, key, value, mask, dropout=0.0, scaling=module.scaling)
    heads = y.transpose(1, 2)
    trial.record(f"{trial.path}.heads", heads)
    trial.finish([heads], [trial.cotangent("dy", heads)] if trial.backward else [])


def _mla(model: Library) -> None:
    trial, x = model.trial, model.trial.number("x")
    module = model.placed(model.part("Attention", model.config, _layer(trial.path)), trial.path)
    y, _ = module(x, position_embeddings=_rotary_of(model, x), attention_mask=model.mask(x))
    trial.finish([y], [trial.cotangent("dy", y)] if trial.backward else [])


def _gate(model: Library) -> None:
    trial = model.trial
    router = model.placed(model.part("TopkRouter", model.config), trial.path)
    _, weight, _ = router(trial.number("x"))
    trial.finish([weight], [trial.cotangent("dy", weight)] if trial.backward else [])


def _experts(model: Library) -> None:
    trial = model.trial
    module = model.placed(model.part("Experts", model.config), trial.path)
    # The router of the library gives float32 weights whatever the type of the model is.
    weight = trial.number("topk_weight", model.torch.float32)
    y = module(trial.number("x"), trial.integer("topk_idx"), weight)
    trial.finish([y], [trial.cotangent("dy", y)] if trial.backward else [])


def _moe(model: Library) -> None:
    name = "Moe" if model.v2 else "MoE"
    _simple(model, model.part(name, model.config), model.trial.number("x"))


def _block(model: Library) -> None:
    trial, x = model.trial, model.trial.number("x")
    layer = model.placed(model.part("DecoderLayer", model.config, trial.case.arguments["layer"]), trial.path)
    y = layer(x, attention_mask=model.mask(x), position_embeddings=_rotary_of(model, x))
    trial.finish([y], [trial.cotangent("dy", y)] if trial.backward else [])


def _head_loss(model: Library) -> None:
    trial, config = model.trial, model.config
    norm = model.placed(model.part("RMSNorm", config.hidden_size, eps=config.rms_norm_eps), "model.norm")
    head = model.placed(
        model.torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False, device="meta"), "lm_head"
    )
    logits = head(norm(trial.number("x")))
    if trial.backward:
        logits.retain_grad()
    targets = trial.integer("targets")
    compute = library("transformers.loss.loss_utils").ForCausalLMLoss
    loss = compute(logits, targets, config.vocab_size, shift_labels=targets)
    trial.record("logits", logits)
    trial.record("loss", loss)
    trial.finish([loss], [None])
    trial.record("grad.logits", logits.grad)


def _model(model: Library) -> None:
    trial = model.trial
    causal = model.part("ForCausalLM", model.config)
    causal.model.rotary_emb = model.rotary()  # its table is no weight, and was not computed above
    model.placed(causal, "")
    if trial.config.tie_word_embeddings:
        causal.tie_weights()
    ids = trial.integer("input_ids")
    packed = trial.segments is not None or "position_ids" in trial.inputs
    given: dict[str, Any] = {"use_cache": False}
    if packed:  # own positions would be taken for packing
        given |= {"attention_mask": model.packed(*ids.shape), "position_ids": trial.positions(*ids.shape)}
    targets = trial.targets
    if targets is not None:
        given |= {"labels": targets, "shift_labels": targets}
    result = causal(input_ids=ids, **given)
    trial.record("logits", result.logits)
    trial.record("loss", result.loss)
    starts, cotangents = trial.starts(result.loss)
    trial.finish(starts, cotangents)


COMPONENTS: Final[Mapping[str, Callable[[Library], None]]] = {
    "linear": _linear,
    "embedding": _embedding,
    "norm": _norm,
    "rope_tables": _rope_tables,
    "rope": _rope,
    "attention": _attention,
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
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--attention", choices=ATTENTION, default="eager")
    parser.add_argument("--experts", choices=EXPERTS, default="grouped_mm")


ADAPTER: Final = Adapter(
    str(__doc__), _options, lambda case, given: outputs(case, given.dtype, given.attention, given.experts)
)

if __name__ == "__main__":
    sys.exit(ADAPTER.main())

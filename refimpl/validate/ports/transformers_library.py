"""What transformers is to an adapter: its classes for a case's configuration, its names, its masks.

DeepseekV3 for sigmoid gates, DeepseekV2 for softmax ones.  SPEC CHOICE-2 (profile hf).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from refimpl.config.choices import Choices
from refimpl.config.model import ModelConfig
from refimpl.numerics.arithmetic import Array
from refimpl.validate.given import NotForMe, PortCase
from refimpl.validate.ports.agreement import demand, routes
from refimpl.validate.ports.trial import Names, Trial, library

CHOICES: Final = Choices.named("hf").replace(v2_topk_norm="ignore")


class Library:
    """The classes of a model family, with the configuration of the case."""

    def __init__(self, trial: Trial, attention: str, experts: str) -> None:
        config = trial.config
        self.trial, self.torch = trial, trial.torch
        self.v2 = config.scoring_func == "softmax"
        _expressible(trial.case, config, self.v2)
        demand(trial.case, config, CHOICES, "transformers")
        family = "deepseek_v2" if self.v2 else "deepseek_v3"
        self.modeling = library(f"transformers.models.{family}.modeling_{family}")
        self.prefix = "DeepseekV2" if self.v2 else "DeepseekV3"
        self.config = self._config(config, family)
        self.config._attn_implementation = attention
        self.config._experts_implementation = experts

    def _config(self, config: ModelConfig, family: str) -> Any:
        fields = {**copy.deepcopy(config.to_dict()), "model_type": family, "quantization_config": None}
        fields |= {"n_group": config.groups, "topk_group": config.kept_groups}
        configuration = library(f"transformers.models.{family}.configuration_{family}")
        try:
            return getattr(configuration, f"{self.prefix}Config")(**fields)
        except Exception as error:  # its checks raise what they like
            said = " ".join(str(error).split())
            raise NotForMe(f"transformers refuses the configuration ({said})") from error

    def part(self, name: str, *arguments: Any, **named: Any) -> Any:
        """A module of the family, without memory for weights that are loaded anyway."""
        with self.torch.device("meta"):
            return getattr(self.modeling, f"{self.prefix}{name}")(*arguments, **named)

    def rotary(self) -> Any:
        return getattr(self.modeling, f"{self.prefix}RotaryEmbedding")(self.config)

    def placed(self, module: Any, path: str) -> Any:
        """A module with the weights that the case has below a path."""
        trial, below = self.trial, f"{path}." if path else ""
        trial.load(module, lambda key: _names(f"{below}{key}", trial.config, trial.weights))
        trial.watch(module, lambda name: f"{below}{name}" if name else path, _shown)
        return module

    @contextmanager
    def noting_rotations(self) -> Iterator[None]:
        """Note the rotated parts of queries and keys, which no module of its own computes."""
        names = (
            ("apply_rotary_emb",) if self.v2 else ("apply_rotary_pos_emb_interleave", "apply_rotary_pos_emb")
        )
        kept = {name: getattr(self.modeling, name) for name in names}

        def noting(rotate: Callable[..., Any]) -> Callable[..., Any]:
            def rotated(*arguments: Any, **named: Any) -> Any:
                both = rotate(*arguments, **named)
                path = self.trial.inside("self_attn")
                for name, value in zip(("q_pe", "k_pe"), both, strict=True):
                    self.trial.record(f"{path}.{name}", value.transpose(1, 2))
                return both

            return rotated

        for name, rotate in kept.items():
            setattr(self.modeling, name, noting(rotate))
        try:
            yield
        finally:
            for name, rotate in kept.items():
                setattr(self.modeling, name, rotate)

    def mask(self, hidden: Any) -> Any:
        """The attention mask for hidden states (B, S, D): its own causal one, or that of packed sequences."""
        size, length = hidden.shape[:2]
        if self.trial.segments is not None:
            return self.packed(size, length)
        masking = library("transformers.masking_utils")
        return masking.create_causal_mask(
            config=self.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None
        )

    def packed(self, size: int, length: int) -> Any:
        """(B, 1, S, S): truth values for sdpa, for eager what is added to the scores."""
        seen = self.trial.allowed(size, length)
        if self.config._attn_implementation == "sdpa":
            return seen
        lowest = self.torch.finfo(self.trial.dtype).min
        return self.torch.zeros(seen.shape, dtype=self.trial.dtype).masked_fill(~seen, lowest)


def _expressible(case: PortCase, config: ModelConfig, v2: bool) -> None:
    """Raises NotForMe for forms that the library has no field for."""
    if config.has_indexer:
        raise NotForMe("transformers' DeepseekV3 has no sparse attention")
    if routes(case, config):
        method = "V2's softmax" if v2 else "V3's sigmoid"
        if v2 == config.has_selection_bias:
            raise NotForMe(f"transformers has no router with {method} and topk_method {config.topk_method}")
        if not v2 and config.experts_per_group < 2:
            raise NotForMe("transformers' router needs two experts in a group")
        if case.component != "gate" and config.n_shared_experts == 0:
            raise NotForMe("transformers' DeepseekV3MoE always has shared experts")
    if case.component == "model" and config.moe_layer_freq != 1:
        raise NotForMe("transformers ignores moe_layer_freq")
    if case.component == "model" and config.num_nextn_predict_layers:
        raise NotForMe("transformers' DeepseekV3ForCausalLM has no MTP modules to give gradients of")
    if v2 and not config.rope_interleave:
        raise NotForMe("transformers' DeepseekV2 rotates neighbours only")


def _names(key: str, config: ModelConfig, weights: Mapping[str, Array]) -> Names:
    """Its name of a weight in ours: it stacks experts, and fuses gate_proj and up_proj."""
    if key == "lm_head.weight" and key not in weights:
        return "model.embed_tokens.weight"
    path, _, leaf = key.rpartition(".")
    if leaf not in ("gate_up_proj", "down_proj"):
        return key
    projections = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
    experts = range(config.n_routed_experts)
    return [[f"{path}.{expert}.{name}.weight" for name in projections] for expert in experts]


def _shown(path: str, arguments: Sequence[Any], output: Any) -> Iterable[tuple[str, Any]]:
    above, _, leaf = path.rpartition(".")
    if leaf == "gate":
        logits, weight, idx = output
        yield from ((f"{path}.logits", logits), (f"{path}.topk_idx", idx), (f"{path}.topk_weight", weight))
    elif leaf in ("down_proj", "o_proj"):
        yield f"{above}.{'act' if leaf == 'down_proj' else 'heads'}", arguments[0]
        yield path, output
    else:
        yield path, output[0] if leaf == "self_attn" else output

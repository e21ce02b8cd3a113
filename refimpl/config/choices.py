"""Choices: where the sources disagree or are silent, a field with a name.  SPEC CHOICE-1, CHOICE-2.

`CHOICES` is the table of what can be chosen, who does what, and why the default is what it is; `PROFILES`
fill it.  A choice is neither the checkpoint's (ModelConfig) nor the training run's (TrainingConfig).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

from refimpl.config.model import ModelConfig
from refimpl.config.rules import Rule, integer, one_of, optional, show
from refimpl.errors import Invalid

# Sources: who computes so.
HF: Final = "transformers 5.23"
DEMO: Final = "DeepSeek's inference code"
REMOTE: Final = "DeepSeek's modeling code in the checkpoint repositories"
REPORT: Final = "DeepSeek-V3 report"
MEGATRON: Final = "Megatron-LM"


@dataclass(frozen=True)
class Choice:
    """One freedom: its alternatives, each with who does it, the default, and the reason for it."""

    name: str
    question: str
    alternatives: Mapping[str | float, str]  # value -> who, and what it means
    default: Any
    reason: str
    rule: Rule | None = None  # what is allowed, where it is not just the alternatives

    @property
    def allowed(self) -> Rule:
        return self.rule or one_of(*self.alternatives)


CHOICES: Final[tuple[Choice, ...]] = (
    Choice(
        "yarn_applies",
        "When do YaRN's frequencies and softmax factor apply?",
        {
            "config": f"whenever the config has YaRN, at every length: {HF}, {MEGATRON}",
            "beyond_original": f"only if the longest sequence is longer than the original context: {DEMO}",
            "never": f"not at all: pre-training at 4096 tokens ({REPORT}, before section 4.3)",
        },
        "config",
        "the config's field is honoured",
    ),
    Choice(
        "max_seq_len",
        "Which longest sequence does yarn_applies = beyond_original compare?",
        {"null": f"max_position_embeddings; {DEMO} has an own number (16384 by default)"},
        None,
        "the config says what the model is meant for",
        optional(integer()),
    ),
    Choice(
        "yarn_mscale_zero",
        "What scales cos and sin when mscale or mscale_all_dim is absent or 0?",
        {
            "hf": f"0.1 ln(factor) + 1, whatever the other one is: {HF}",
            "remote": "mscale(mscale) / mscale(mscale_all_dim), mscale(m) = 0.1 m ln(factor) + 1, where "
            f"an absent mscale is 1 and an absent mscale_all_dim 0: {REMOTE}, {MEGATRON}",
        },
        "hf",
        "the profile's source; the two are equal whenever both fields are set",
    ),
    Choice(
        "topk_norm_epsilon",
        "What is added to the sum that normalises the routing weights?",
        {1e-20: f"{HF}, {REMOTE}, {MEGATRON}", 0.0: f"{DEMO}, {REPORT} eq. 13"},
        1e-20,
        "the profile's source; it changes no bit unless the chosen scores sum to less than 2^-13",
    ),
    Choice(
        "topk_norm_single",
        "Is the routing weight of a single chosen expert (K = 1) normalised?",
        {
            "normalise": f"yes: it is the scaling factor and has no gradient: {HF}, {DEMO}, {REPORT} eq. 13",
            "leave": f"no: {REMOTE}, {MEGATRON}",
        },
        "normalise",
        "norm_topk_prob is honoured as written",
    ),
    Choice(
        "v2_topk_norm",
        "What does norm_topk_prob do in a gate without selection bias (V2, K > 1)?",
        {
            "normalise_unscaled": f"the weights are normalised and not scaled: {REMOTE} (V2)",
            "ignore": f"nothing, the weights are only scaled: {HF} (deepseek_v2), {DEMO}, V2 paper",
            "normalise_scaled": "the weights are normalised and scaled, as in V3",
        },
        "normalise_unscaled",
        "every field of the config is honoured; that transformers ignores norm_topk_prob is a known mistake",
    ),
    Choice(
        "group_score_size",
        "How many of a group's best biased scores make the group's score (with selection bias)?",
        {
            "two": f"2: {HF}, {DEMO}, {REMOTE}",
            "topk_over_groups": f"num_experts_per_tok // topk_group: {MEGATRON}, {REPORT} 2.1.2 (K / M)",
        },
        "two",
        "the released code; the same for V3 itself (8 / 4)",
    ),
    Choice(
        "fp8_weights",
        "What is an FP8 weight of a checkpoint, where it is dequantised?",
        {
            "float32": "code times scale, rounded once to float32",
            "bf16": f"that, rounded to bfloat16: fp8_cast_bf16.py and weight_dequant of {DEMO}",
        },
        "float32",
        "nothing is lost that the checkpoint has; kernels that run on the codes do not round weights either",
    ),
    Choice(
        "latent_norm_epsilon",
        "Which epsilon do q_a_layernorm and kv_a_layernorm have?",
        {
            "1e-6": f"the class default, whatever rms_norm_eps is: {HF}, {REMOTE}, {DEMO}",
            "config": f"rms_norm_eps: {MEGATRON}",
        },
        "1e-6",
        "the released code; the same for every published DeepSeek config",
    ),
    Choice(
        "loss_divisor",
        "By what is the sum of the cross-entropies divided?",
        {
            "targets": f"the number of targets that count: {HF}, {MEGATRON}",
            "positions": f"the number of positions T, also where fewer have a target: {REPORT} eq. 24",
        },
        "targets",
        "a mean over what was summed",
    ),
    Choice(
        "mtp_concat",
        "In which order does eh_proj of an MTP module read its two inputs?",
        {
            "embedding_first": f"[enorm(embedding); hnorm(hidden)]: {HF}, vLLM, SGLang, {MEGATRON}",
            "hidden_first": f"[hidden; embedding]: {REPORT} eq. 21",
        },
        "embedding_first",
        "the released weights need it: all four loaders agree",
    ),
    Choice(
        "mtp_hidden",
        "Which hidden state of the trunk does the first MTP module read?",
        {
            "after_norm": f"the output of model.norm: {HF}, vLLM, {MEGATRON}",
            "before_norm": "the last layer's output, before model.norm: llama.cpp",
        },
        "after_norm",
        "most loaders; the report is silent, and DeepSeek did not answer when asked",
    ),
    Choice(
        "mtp_passes",
        "What does an MTP module hand to the next one?",
        {
            "after_norm": f"the output of its shared_head.norm: {HF}, SGLang, {MEGATRON}",
            "before_norm": f"the output of its block: {REPORT} eq. 22, vLLM",
        },
        "after_norm",
        "as the trunk hands its normalised state to the first module",
    ),
    Choice(
        "mtp_first_embedding",
        "What is the embedding that an MTP module reads at the first position of a sequence?",
        {"keep": f"that of the next token, as everywhere: {HF}, {MEGATRON}", "zero": "zeros: vLLM"},
        "keep",
        "ids are shifted already, so the token there is a real one; zeros are an artefact of inference",
    ),
    Choice(
        "mtp_positions",
        "Which rotary positions does MTP module k use at position i?",
        {
            "token": f"i + k, that of the token whose embedding it reads: {HF}",
            "hidden": f"i, that of the hidden state: vLLM, {MEGATRON}",
        },
        "token",
        "the profile's source; attention sees differences only, so no output but the rotated parts changes",
    ),
    Choice(
        "mtp_loss_divisor",
        "By what is the sum of an MTP module's cross-entropies divided?",
        {
            "targets": f"the number of its own targets: {MEGATRON}",
            "positions": f"the number of positions T, although module k has T - k targets: {REPORT} eq. 24",
        },
        "targets",
        "a mean over what was summed",
    ),
    Choice(
        "balance_counts",
        "Which experts does the sequence-wise balance loss count?",
        {
            "plain": f"the K best by unbiased score, without groups: {REPORT} eq. 18, {MEGATRON}",
            "selected": f"those that the gate chose: {REMOTE} (V2)",
        },
        "plain",
        "the equation as printed",
    ),
    Choice(
        "balance_sequence",
        "What is a sequence of the balance loss when documents are packed?",
        {"row": f"a row of the batch: {MEGATRON}", "segment": "a document"},
        "row",
        "V3 was pre-trained on packed rows without masks between documents",
    ),
)

_TABLE: Final = {choice.name: choice for choice in CHOICES}


def _chosen(name: str) -> Any:
    return field(default=_TABLE[name].default)


@dataclass(frozen=True, kw_only=True)
class Choices:
    """One alternative for every choice; the defaults are the profile `hf`.  Raises Invalid."""

    yarn_applies: str = _chosen("yarn_applies")
    max_seq_len: int | None = _chosen("max_seq_len")
    yarn_mscale_zero: str = _chosen("yarn_mscale_zero")
    topk_norm_epsilon: float = _chosen("topk_norm_epsilon")
    topk_norm_single: str = _chosen("topk_norm_single")
    v2_topk_norm: str = _chosen("v2_topk_norm")
    group_score_size: str = _chosen("group_score_size")
    fp8_weights: str = _chosen("fp8_weights")
    latent_norm_epsilon: str = _chosen("latent_norm_epsilon")
    loss_divisor: str = _chosen("loss_divisor")
    mtp_concat: str = _chosen("mtp_concat")
    mtp_hidden: str = _chosen("mtp_hidden")
    mtp_passes: str = _chosen("mtp_passes")
    mtp_first_embedding: str = _chosen("mtp_first_embedding")
    mtp_positions: str = _chosen("mtp_positions")
    mtp_loss_divisor: str = _chosen("mtp_loss_divisor")
    balance_counts: str = _chosen("balance_counts")
    balance_sequence: str = _chosen("balance_sequence")

    def __post_init__(self) -> None:
        for choice in CHOICES:
            choice.allowed.settle(f"choice {choice.name}", getattr(self, choice.name))

    @classmethod
    def named(cls, profile: str) -> Choices:
        """The profile of that name.  Raises Invalid for another name."""
        if not isinstance(profile, str) or profile not in PROFILES:
            raise Invalid(f"choices are {show(profile)}, but they must be one of {', '.join(PROFILES)}.")
        return PROFILES[profile]

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Choices:
        """From names and values; what is absent is at its default.  Raises Invalid for unknown ones."""
        _check_names(given)
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def replace(self, **changes: Any) -> Choices:
        """With other alternatives.  Raises Invalid for unknown names and values."""
        _check_names(changes)
        return Choices(**(self.to_dict() | changes))

    def differing(self, other: Choices) -> tuple[str, ...]:
        """The names of the choices that are not the same."""
        return tuple(
            item.name for item in fields(self) if getattr(self, item.name) != getattr(other, item.name)
        )

    def yarn_active(self, config: ModelConfig) -> bool:
        """Whether YaRN's frequencies and factors apply to this model."""
        yarn = config.rope_scaling
        if yarn is None or self.yarn_applies == "never":
            return False
        longest = config.max_position_embeddings if self.max_seq_len is None else self.max_seq_len
        return self.yarn_applies == "config" or longest > yarn.original_max_position_embeddings

    def group_score_count(self, config: ModelConfig) -> int:
        """How many scores make a group's score, with selection bias.  Raises Invalid if a group has fewer."""
        if self.group_score_size == "two":
            count, why = 2, 'group_score_size "two"'
        else:
            count = config.num_experts_per_tok // config.kept_groups
            why = 'group_score_size "topk_over_groups" (num_experts_per_tok // topk_group)'
        if config.kept_groups < config.groups and not 1 <= count <= config.experts_per_group:
            raise Invalid(
                f"choice {why} is {count}, but it must be from 1 to the experts of a group "
                f"({config.experts_per_group})."
            )
        return count

    def norm_epsilon(self, config: ModelConfig) -> float:
        """The epsilon of q_a_layernorm and kv_a_layernorm."""
        return 1e-6 if self.latent_norm_epsilon == "1e-6" else config.rms_norm_eps


def _check_names(given: Mapping[str, Any]) -> None:
    for name in given:
        if name not in _TABLE:
            raise Invalid(f"choice {show(name)} is unknown, but it must be one of {', '.join(_TABLE)}.")


PROFILES: Final[Mapping[str, Choices]] = {
    "hf": Choices(),
    "official": Choices(
        yarn_applies="beyond_original",
        yarn_mscale_zero="remote",
        topk_norm_epsilon=0.0,
        v2_topk_norm="ignore",
    ),
    "report": Choices(
        yarn_applies="beyond_original",
        yarn_mscale_zero="remote",
        topk_norm_epsilon=0.0,
        v2_topk_norm="ignore",
        group_score_size="topk_over_groups",
        loss_divisor="positions",
        mtp_concat="hidden_first",
        mtp_passes="before_norm",
        mtp_loss_divisor="positions",
    ),
    "megatron": Choices(
        yarn_mscale_zero="remote",
        topk_norm_single="leave",
        v2_topk_norm="ignore",
        group_score_size="topk_over_groups",
        latent_norm_epsilon="config",
        mtp_positions="hidden",
    ),
}

"""Changes to the source of the C port: mistakes of the catalogue, other mistakes, and right rewrites.

The same columns as in planted.py, for one file of c/: a row is text edits (old, new), each old text standing
in the file exactly once.  A mistake is made the way a C port would make it.  Where forward and backward share
a rule or a table, both are wrong; G01, G08 and G19 are wrong in the forward pass only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "c"
BF16 = """static float bf16(float x)
{
    uint32_t bits;

    memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000;
    memcpy(&x, &bits, sizeof bits);
    return x;
}

"""
Edit = tuple[str, str]
NORM, MLP, GATE = ("norm",), ("mlp",), ("gate",)
ROPE, TABLES, ROTATION = ("rope", "rope_tables"), ("rope_tables",), ("rope",)


@dataclass(frozen=True)
class Planted:
    """A change to one file of the C port."""

    name: str
    answer: tuple[str, ...]  # ids of the catalogue, any of which is right
    file: str
    edits: tuple[Edit, ...]
    components: tuple[str, ...]  # where it can show
    stage: tuple[str, ...] = ()  # patterns of the first tensor that is off, where the answer is empty
    hidden: str = ""  # why no case of the suites shows it, where none does
    right: bool = False  # a correct rewrite: it passes, and no diagnosis is the answer

    @property
    def source(self) -> str:
        text = (FOLDER / self.file).read_text()
        for old, new in self.edits:
            if text.count(old) != 1:
                raise ValueError(f"{self.name}: {old!r} is there {text.count(old)} times; once is required")
            text = text.replace(old, new)
        return text


_EPS = 'float eps = (float)number_field(json_get(c->root, "arguments", JSON_OBJECT), "eps");'
_ROW = "const float *row = x.values + t * x.columns;\n"
_CENTRED = """float *row = x.values + t * x.columns, centre = 0.0f;
        for (d = 0; d < x.columns; d++)
            centre += row[d] / (float)x.columns;
        for (d = 0; d < x.columns; d++)
            row[d] -= centre;
        {
"""
_DX = "dx.values[t * x.columns + d] = scale * (dy_row[d] * gain.values[d] - x_row[d] * scale * mean);\n"
_DX_CENTRED = f"""{_DX}        for (mean = 0.0f, d = 0; d < x.columns; d++)
            mean += dx.values[t * x.columns + d] / (float)x.columns;
        for (d = 0; d < x.columns; d++)
            dx.values[t * x.columns + d] -= mean;
"""
_NORMED = "y.values[t * x.columns + d] = row[d] * inverse.values[t] * gain.values[d];\n    }\n"
NORMS = (
    Planted(
        "A04", ("A04",), "norm.c", ((_EPS, f"{_EPS}\n\n    eps = 1e-6f; /* the class default */"),), NORM
    ),
    Planted(
        "A05",
        ("A05",),
        "norm.c",
        ((_ROW, _CENTRED), (_NORMED, _NORMED.replace("    }\n", "        }\n    }\n")), (_DX, _DX_CENTRED)),
        NORM,
    ),
)

_TURN = """float cos = r->cos.values[t * half + m], sin = sign * r->sin.values[t * half + m];
                float turned = *first * cos - *second * sin;
                *second = *first * sin + *second * cos;
"""
_TURN_TWO = """const float *cos = r->cos.values + t * half, *sin = r->sin.values + t * half;
                size_t i = 2 * m % half, j = (2 * m + 1) % half; /* the table is [f0 .. f31, f0 .. f31] */
                float turned = *first * cos[i] - *second * sign * sin[i];
                *second = *first * sign * sin[j] + *second * cos[j];
"""
_ANGLE = "return position * inv_freq;"
_POSITION = "angle((float)positions[t], "
_GIVEN = 'case_output(c, joined("%s.%s", c->path, NAMES[i]), x);'
_GIVEN_AS_HALVES = f"""{{
            Matrix y = matrix_new(x.rows, x.columns);
            size_t k;
            for (k = 0; interleaved && k < x.rows * x.columns; k++) {{
                size_t within = k % r.width;
                y.values[k - within + within % 2 * (r.width / 2) + within / 2] = x.values[k];
            }}
            x = interleaved ? y : x;
        }}
        {_GIVEN}"""
_FLAG = 'flag_field_or(c->config, "rope_interleave", 1)'
_TABLES = "static Tables tables("
_COS, _SIN = "cosf(turned) * factor;", "sinf(turned) * factor;"
ROTARY = (
    Planted("R01", ("R01",), "rope.c", ((_FLAG, _FLAG.replace("1)", "0)")),), ROTATION),
    Planted("R02", ("R02",), "rope.c", ((_TURN, _TURN_TWO),), ROTATION),
    Planted("R03", ("R03",), "rope.c", ((_GIVEN, _GIVEN_AS_HALVES),), ROTATION, right=True),
    Planted(
        "R04",
        ("R04",),
        "rope.c",
        (
            (_ANGLE, "return bf16(position) * bf16(inv_freq);"),
            ("static float angle(", f"{BF16}static float angle("),
        ),
        ROPE,
    ),
    Planted(
        "R05",
        ("R05",),
        "rope.c",
        ((_COS, f"bf16({_COS[:-1]});"), (_SIN, f"bf16({_SIN[:-1]});"), (_TABLES, BF16 + _TABLES)),
        ROPE,
    ),
    Planted("R06", ("R06",), "rope.c", ((_POSITION, "angle((float)(int16_t)positions[t], "),), ROPE),
)

_RAMPED = "if (yarn != NULL) {\n            double ramp"
_LOW = "fmax(floor(dimension("
_HIGH = "fmin(ceil(dimension("
_DIVIDED = "frequency / factor * ramp"
_FACTOR = "return mscale(factor, m) / mscale(factor, all);"
_ALL = '    all = number_field_or(yarn, "mscale_all_dim", 0.0);\n'
_SQUARE = "scale * mscale(factor, all) * mscale(factor, all);"
YARN = (
    Planted("Y01", ("Y01",), "rope.c", ((_RAMPED, _RAMPED.replace("yarn != NULL", "0")),), ROPE),
    Planted(
        "Y02",
        ("Y02",),
        "rope.c",
        (('strcmp(applies, "config") == 0', 'strcmp(applies, "never") != 0'),),
        TABLES,
    ),
    Planted(
        "Y03",
        ("Y03",),
        "rope.c",
        ((_LOW, _LOW.replace("floor", "")), (_HIGH, _HIGH.replace("ceil", ""))),
        ROPE,
    ),
    Planted(
        "Y04",
        ("Y04",),
        "rope.c",
        (("width - 1.0);", "width / 2.0 - 1.0);"),),
        ROPE,
        hidden="at width 64 no published base and length reaches the clamp (benign in the catalogue)",
    ),
    Planted(
        "Y05",
        ("Y05",),
        "rope.c",
        ((_DIVIDED, "pow(factor * theta, -2.0 * (double)m / (double)width) * ramp"),),
        ROPE,
    ),
    Planted("Y06", ("Y06",), "rope.c", ((_FACTOR, "return mscale(factor, m);"),), ROPE),
    Planted("Y07", ("Y07",), "rope.c", ((_ALL, "    all = 0.0;\n"),), TABLES),
    Planted("Y08", ("Y08",), "rope.c", ((_ALL, _ALL.replace("_all_dim", "")),), TABLES),
    Planted("Y09-once", ("Y09",), "rope.c", ((_SQUARE, "scale * mscale(factor, all);"),), TABLES),
    Planted("Y09-four", ("Y09",), "rope.c", ((_SQUARE, "scale * pow(mscale(factor, all), 4.0);"),), TABLES),
    Planted("Y10", ("Y10",), "rope.c", ((_ALL, _ALL.replace("= ", "= 0.1 * ")),), TABLES),
    Planted(
        "A01",
        ("A01",),
        "rope.c",
        (('size_field(c->config, "qk_nope_head_dim")', 'size_field(c->config, "kv_lora_rank")'),),
        TABLES,
    ),
)

_CHOICE = "(bias == NULL ? 0.0f : bias[e])"
_LOGITS = "    scores = matrix_times_transpose(x, router);\n"
_SCORED = "score(scores.values + t * r.experts, &r);"
_WEIGHTS = "    weights = weights_of(scores, experts, &r, sums);\n"
_WEIGHTS_BIASED = """    weights = matrix_new(scores.rows, r.experts);
    for (t = 0; t < scores.rows * r.experts; t++)
        weights.values[t] = scores.values[t] + (r.biased ? bias.values[t % r.experts] : 0.0f);
    weights = weights_of(weights, experts, &r, sums);
"""
_BEST = "r.best = r.biased ? 2 : 1;"
_SOFTMAX = 'r.softmax = chosen_of("scoring_func", scoring, "softmax", "sigmoid");'
_CHOOSE = "static int64_t *choose("
_GROUPED = "if (r->kept < r->groups)"
_DROP = "drop_groups(choice, r, group_scores, scratch);\n"
_DROP_AND_SCALE = """{
            float sum = 0.0f, *s = scores.values + t * r->experts;
            drop_groups(choice, r, group_scores, scratch);
            for (e = 0; e < r->experts; e++)
                sum += choice[e] > -INFINITY ? s[e] : 0.0f;
            for (e = 0; e < r->experts && r->softmax; e++)
                s[e] /= sum;
        }
"""
_NORMALISED = 'r->normalised = flag_field_or(c->config, "norm_topk_prob", 0);'
_SCALE = 'r->scale = (float)number_field(c->config, "routed_scaling_factor");'
_WEIGHT = "weight[k] = weight[k] / sums.values[t] * r->scale;"
_WEIGHTS_OF = "static Matrix weights_of("
ROUTING = (
    Planted("G01", ("G01",), "gate.c", ((_WEIGHTS, _WEIGHTS_BIASED),), GATE),
    Planted(
        "G02",
        ("G02",),
        "gate.c",
        ((_CHOICE, _CHOICE.replace("bias[e]", "bf16(bias[e])")), (_CHOOSE, BF16 + _CHOOSE)),
        GATE,
    ),
    Planted(
        "G03",
        ("G03",),
        "gate.c",
        (
            (
                _LOGITS,
                f"{_LOGITS}    for (t = 0; t < x.rows * r.experts; t++)\n"
                "        scores.values[t] = bf16(scores.values[t]);\n",
            ),
            (_CHOOSE, BF16 + _CHOOSE),
        ),
        GATE,
    ),
    Planted("G04", ("G04",), "gate.c", (("choice[e] = -INFINITY;", "choice[e] = 0.0f;"),), GATE),
    Planted("G05", ("G05",), "gate.c", ((_BEST, "r.best = 1;"),), GATE),
    Planted(
        "G06",
        ("G06",),
        "gate.c",
        (
            ("choose(scores, bias.values, &r)", "choose(scores, width == 7168 ? bias.values : NULL, &r)"),
            (_BEST, _BEST.replace("r.biased", 'r.biased && size_field(c->config, "hidden_size") == 7168')),
        ),
        GATE,
    ),
    Planted("G07-softmax", ("G07",), "gate.c", ((_SOFTMAX, _SOFTMAX.replace(");", ") || 1;")),), GATE),
    Planted("G07-ungrouped", ("G07",), "gate.c", ((_GROUPED, "if (0)"),), GATE),
    Planted("G08", ("G08",), "gate.c", ((_DROP, _DROP_AND_SCALE),), GATE),
    Planted("G09-missing", ("G09",), "gate.c", ((_NORMALISED, "r->normalised = 0;"),), GATE),
    Planted("G09-extra", ("G09",), "gate.c", ((_NORMALISED, "r->normalised = 1;"),), GATE),
    Planted("G10", ("G10",), "gate.c", (("sum + r->epsilon", "fmaxf(sum, 6.1e-5f)"),), GATE),
    Planted(
        "G11",
        ("G11",),
        "gate.c",
        ((_SCALE, f"{_SCALE}\n    if (!r->normalised)\n        r->scale = 1.0f;"),),
        GATE,
    ),
    Planted(
        "G12", ("G12",), "gate.c", ((_WEIGHT, _WEIGHT.replace("r->scale", "r->scale * r->scale")),), GATE
    ),
    Planted("G13", ("G13",), "gate.c", ((_WEIGHT, _WEIGHT.replace(" * r->scale", "")),), GATE),
    Planted(
        "G16",
        ("G16",),
        "gate.c",
        (("values[i] > values[best]", "values[i] >= values[best]"),),
        GATE,
        right=True,
    ),
    Planted(
        "G17",
        ("G17",),
        "gate.c",
        (
            (_WEIGHT, "weight[k] = bf16(weight[k] / sums.values[t] * r->scale);"),
            (_WEIGHTS_OF, BF16 + _WEIGHTS_OF),
        ),
        GATE,
    ),
    Planted(
        "G18",
        ("G18",),
        "gate.c",
        (
            ("drop_groups(float *choice, ", "drop_groups(float *choice, const float *unbiased, "),
            ("group_score(choice + g * size", "group_score(unbiased + g * size"),
            (_DROP, _DROP.replace("choice, ", "choice, scores.values + t * r->experts, ")),
        ),
        GATE,
    ),
    Planted(
        "G19",
        ("G19",),
        "gate.c",
        (
            (
                _SCORED,
                f"{{\n        size_t e;\n        for (e = 0; e < r.experts && r.biased; e++)\n"
                f"            scores.values[t * r.experts + e] += bias.values[e];\n        {_SCORED}\n    }}",
            ),
            ("choose(scores, bias.values, &r)", "choose(scores, NULL, &r)"),
        ),
        GATE,
    ),
)
EXPERT = (
    Planted(
        "G21",
        ("G21",),
        "mlp.c",
        (
            ("act = activation(gate, up);", "act = activation(up, gate);"),
            (
                "activation_backward(dact, gate, up, dgate, dup);",
                "activation_backward(dact, up, gate, dup, dgate);",
            ),
        ),
        MLP,
    ),
)

UNKNOWN = (
    Planted(
        "epsilon-outside-root",
        (),
        "norm.c",
        (("sqrtf(mean + eps)", "(sqrtf(mean) + eps)"),),
        NORM,
        stage=("*_layernorm", "model.norm"),
    ),
    Planted(
        "gain-plus-one",
        (),
        "norm.c",
        (("inverse.values[t] * gain.values[d]", "inverse.values[t] * (1.0f + gain.values[d])"),),
        NORM,
        stage=("*_layernorm", "model.norm"),
    ),
    Planted(
        "turned-backwards",
        (),
        "rope.c",
        (("rotate(x, &r, interleaved, 1.0f)", "rotate(x, &r, interleaved, -1.0f)"),),
        ROTATION,
        stage=("*.q_pe",),
    ),
    Planted(
        "relu-for-silu",
        (),
        "mlp.c",
        (
            (
                "gate.values[i] * sigmoid(gate.values[i]) *",
                "(gate.values[i] > 0.0f ? gate.values[i] : 0.0f) *",
            ),
        ),
        MLP,
        stage=("*.act",),
    ),
)
KNOWN = (*NORMS, *ROTARY, *YARN, *ROUTING, *EXPERT)
PLANTED: dict[str, Planted] = {p.name: p for p in (*KNOWN, *UNKNOWN)}

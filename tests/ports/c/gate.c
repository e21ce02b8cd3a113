/* The gate: which experts a token goes to, and with which weights. ROUTE-1 to ROUTE-7, ROUTE-9. */

#include "operations.h"
#include "process.h"

#include <math.h>
#include <string.h>

typedef struct {
    size_t experts, groups, kept, chosen; /* N, G, kept groups, K */
    int softmax;                          /* scores are a softmax (V2) instead of sigmoids (V3) */
    int biased;                           /* a bias decides the choice (noaux_tc) */
    size_t best;                          /* choices of a group that are added to its score */
    int normalised;                       /* chosen scores are divided by their sum */
    float epsilon, scale;                 /* added to that sum; factor of the weights */
} Rules;

static int chosen_of(const char *field, const char *value, const char *one, const char *other)
{
    require(strcmp(value, one) == 0 || strcmp(value, other) == 0, "%s is %s, but %s or %s is required", field,
            value, one, other);
    return strcmp(value, one) == 0;
}

/* ROUTE-7: the choices about weights that are normalised. */
static void weigh(Rules *r, const Case *c)
{
    const char *single = json_get(c->choices, "topk_norm_single", JSON_STRING)->text;
    const char *v2 = json_get(c->choices, "v2_topk_norm", JSON_STRING)->text;

    r->normalised = flag_field_or(c->config, "norm_topk_prob", 0);
    r->epsilon = (float)number_field(c->choices, "topk_norm_epsilon");
    r->scale = (float)number_field(c->config, "routed_scaling_factor");
    if (r->biased) {
        if (r->chosen == 1 && chosen_of("topk_norm_single", single, "leave", "normalise"))
            r->normalised = 0;
    } else if (r->chosen == 1 || strcmp(v2, "ignore") == 0) {
        r->normalised = 0;
    } else if (r->normalised && chosen_of("v2_topk_norm", v2, "normalise_unscaled", "normalise_scaled")) {
        r->scale = 1.0f;
    }
}

/* The rules of a configuration: CONF-2, CONF-4. */
static Rules rules_of(const Case *c)
{
    Rules r = {0};
    int v2 = strcmp(text_field_or(c->config, "model_type", ""), "deepseek_v2") == 0;
    const char *method = text_field_or(c->config, "topk_method", v2 ? "greedy" : "noaux_tc");
    const char *scoring = text_field_or(c->config, "scoring_func", v2 ? "softmax" : "sigmoid");
    const char *size = json_get(c->choices, "group_score_size", JSON_STRING)->text;
    int grouped = strcmp(method, "greedy") != 0;

    r.experts = size_field(c->config, "n_routed_experts");
    r.chosen = size_field(c->config, "num_experts_per_tok");
    r.groups = grouped ? size_field(c->config, "n_group") : 1;
    r.kept = grouped ? size_field(c->config, "topk_group") : 1;
    r.softmax = chosen_of("scoring_func", scoring, "softmax", "sigmoid");
    r.biased = grouped && chosen_of("topk_method", method, "noaux_tc", "group_limited_greedy");
    r.best = r.biased ? 2 : 1;
    if (r.biased && chosen_of("group_score_size", size, "topk_over_groups", "two"))
        r.best = r.chosen / r.kept;
    require(r.experts % r.groups == 0, "%lu experts do not divide into %lu groups", (unsigned long)r.experts,
            (unsigned long)r.groups);
    require(r.kept <= r.groups, "%lu of %lu groups are to be kept", (unsigned long)r.kept,
            (unsigned long)r.groups);
    require(r.chosen <= r.kept * (r.experts / r.groups), "%lu experts are to be chosen, but %lu are kept",
            (unsigned long)r.chosen, (unsigned long)(r.kept * (r.experts / r.groups)));
    require(r.kept == r.groups || (r.best >= 1 && r.best <= r.experts / r.groups),
            "the score of a group is made of %lu experts, but it has %lu", (unsigned long)r.best,
            (unsigned long)(r.experts / r.groups));
    weigh(&r, c);
    return r;
}

/* ROUTE-2, in place, for the N logits of a token. */
static void score(float *logits, const Rules *r)
{
    float largest = logits[0], sum = 0.0f;
    size_t e;

    if (!r->softmax) {
        for (e = 0; e < r->experts; e++)
            logits[e] = sigmoid(logits[e]);
        return;
    }
    for (e = 1; e < r->experts; e++)
        largest = fmaxf(largest, logits[e]);
    for (e = 0; e < r->experts; e++) {
        logits[e] = expf(logits[e] - largest);
        sum += logits[e];
    }
    for (e = 0; e < r->experts; e++)
        logits[e] /= sum;
}

/* The position of the largest value; of equal ones the first. */
static size_t largest_of(const float *values, size_t count)
{
    size_t best = 0, i;

    for (i = 1; i < count; i++)
        if (values[i] > values[best])
            best = i;
    return best;
}

/* Takes the `count` largest of `size` values, from the largest down; what was taken becomes -infinity. */
static void take_largest(float *values, size_t size, size_t count, int64_t *taken)
{
    size_t k;

    for (k = 0; k < count; k++) {
        size_t best = largest_of(values, size);
        taken[k] = (int64_t)best;
        values[best] = -INFINITY;
    }
}

/* ROUTE-4: the score of a group. */
static float group_score(const float *group, size_t size, size_t best, float *scratch)
{
    float sum = 0.0f;
    size_t i;

    memcpy(scratch, group, size * sizeof *group);
    for (i = 0; i < best; i++) {
        size_t at = largest_of(scratch, size);
        sum += scratch[at];
        scratch[at] = -INFINITY;
    }
    return sum;
}

/* ROUTE-5: whether fewer than `kept` groups come before group g; of equal ones the first is better. */
static int group_kept(const float *scores, const Rules *r, size_t g)
{
    size_t before = 0, other;

    for (other = 0; other < r->groups; other++)
        before += scores[other] > scores[g] || (scores[other] == scores[g] && other < g);
    return before < r->kept;
}

/* ROUTE-4, ROUTE-5: the choice of every expert of the other groups becomes -infinity. */
static void drop_groups(float *choice, const Rules *r, float *scores, float *scratch)
{
    size_t size = r->experts / r->groups, g, e;

    for (g = 0; g < r->groups; g++)
        scores[g] = group_score(choice + g * size, size, r->best, scratch);
    for (g = 0; g < r->groups; g++)
        for (e = g * size; e < (g + 1) * size && !group_kept(scores, r, g); e++)
            choice[e] = -INFINITY;
}

/* ROUTE-3 to ROUTE-6: scores (T, N) -> experts (T, K) */
static int64_t *choose(Matrix scores, const float *bias, const Rules *r)
{
    int64_t *experts = allocate(scores.rows * r->chosen, sizeof *experts);
    float *choice = matrix_new(1, r->experts).values, *scratch = matrix_new(1, r->experts).values;
    float *group_scores = matrix_new(1, r->groups).values;
    size_t t, e;

    for (t = 0; t < scores.rows; t++) {
        for (e = 0; e < r->experts; e++)
            choice[e] = scores.values[t * r->experts + e] + (bias == NULL ? 0.0f : bias[e]);
        if (r->kept < r->groups)
            drop_groups(choice, r, group_scores, scratch);
        take_largest(choice, r->experts, r->chosen, experts + t * r->chosen);
    }
    return experts;
}

/* ROUTE-7: scores (T, N), experts (T, K) -> weights (T, K); sums (T, 1) are the divisors. */
static Matrix weights_of(Matrix scores, const int64_t *experts, const Rules *r, Matrix sums)
{
    Matrix weights = matrix_new(scores.rows, r->chosen);
    size_t t, k;

    for (t = 0; t < scores.rows; t++) {
        float *weight = weights.values + t * r->chosen, sum = 0.0f;
        for (k = 0; k < r->chosen; k++) {
            weight[k] = scores.values[t * r->experts + (size_t)experts[t * r->chosen + k]];
            sum += weight[k];
        }
        sums.values[t] = r->normalised ? sum + r->epsilon : 1.0f;
        for (k = 0; k < r->chosen; k++)
            weight[k] = weight[k] / sums.values[t] * r->scale;
    }
    return weights;
}

/* ROUTE-9: dweights (T, K) -> dlogits (T, N) */
static Matrix backward(Matrix dweights, Matrix scores, const int64_t *experts, const Rules *r, Matrix sums)
{
    Matrix dlogits = matrix_new(scores.rows, r->experts);
    size_t t, e, k;

    for (t = 0; t < scores.rows; t++) {
        const float *s = scores.values + t * r->experts, *dweight = dweights.values + t * r->chosen;
        const int64_t *expert = experts + t * r->chosen;
        float *d = dlogits.values + t * r->experts, mean = 0.0f;
        for (k = 0; k < r->chosen && r->normalised; k++)
            mean += dweight[k] * (s[expert[k]] / sums.values[t]);
        for (k = 0; k < r->chosen; k++)
            d[expert[k]] = (dweight[k] - mean) / sums.values[t] * r->scale;
        mean = r->softmax ? dot(d, s, r->experts) : 0.0f;
        for (e = 0; e < r->experts; e++)
            d[e] = r->softmax ? s[e] * (d[e] - mean) : d[e] * s[e] * (1.0f - s[e]);
    }
    return dlogits;
}

/* ROUTE-8: experts that are given have to exist and to be distinct in every row. */
static const int64_t *given_experts(const Case *c, size_t tokens, const Rules *r)
{
    size_t count, i, k;
    const int64_t *experts = case_integers(c, joined("%s.topk_idx", c->path), &count);

    require(count / r->chosen == tokens && count % r->chosen == 0, "%lu experts are given for %lu tokens",
            (unsigned long)count, (unsigned long)tokens);
    for (i = 0; i < count; i++) {
        require(experts[i] >= 0 && (uint64_t)experts[i] < r->experts,
                "expert %ld is given, but there are %lu", (long)experts[i], (unsigned long)r->experts);
        for (k = i - i % r->chosen; k < i; k++)
            require(experts[k] != experts[i], "expert %ld is given twice for a token", (long)experts[i]);
    }
    return experts;
}

void gate_run(Case *c)
{
    Rules r = rules_of(c);
    size_t width = case_width(c, "x");
    Matrix x = case_input(c, "x", width), bias = {0, 0, NULL}, scores, weights, sums = matrix_new(x.rows, 1);
    Matrix router = case_input_of(c, joined("%s.weight", c->path), r.experts, width);
    const int64_t *experts;
    size_t t;

    if (r.biased)
        bias = case_input_of(c, joined("%s.e_score_correction_bias", c->path), 1, r.experts);
    scores = matrix_times_transpose(x, router);
    case_output(c, joined("%s.logits", c->path), scores);
    for (t = 0; t < x.rows; t++)
        score(scores.values + t * r.experts, &r);
    case_output(c, joined("%s.scores", c->path), scores);
    experts = case_backward(c) ? given_experts(c, x.rows, &r) : choose(scores, bias.values, &r);
    weights = weights_of(scores, experts, &r, sums);
    case_output_integers(c, joined("%s.topk_idx", c->path), experts, x.rows * r.chosen);
    case_output(c, joined("%s.topk_weight", c->path), weights);
    if (case_backward(c)) {
        Matrix dlogits = backward(case_input_of(c, "dy", x.rows, r.chosen), scores, experts, &r, sums);
        case_output(c, joined("grad.%s.weight", c->path), matrix_transpose_times(dlogits, x));
        case_output(c, "grad.x", matrix_times(dlogits, router));
    }
}

/* Rotary positions with YaRN. ROPE-1 to ROPE-7.

   Frequencies and factors are computed once, in double; positions, angles, cos and sin are float. */

#include "operations.h"
#include "process.h"

#include <math.h>
#include <string.h>

static const double PI = 3.14159265358979323846;

typedef struct {
    size_t width;    /* R, of the rotated part of a head */
    Matrix inv_freq; /* (1, R/2) */
    Matrix cos, sin; /* (T, R/2) */
} Tables;

/* ROPE-1: YaRN applies as the choice yarn_applies says. */
static int yarn_applies(const Case *c, const Json *scaling)
{
    const char *type, *applies = json_get(c->choices, "yarn_applies", JSON_STRING)->text;
    double longest;

    if (scaling == NULL)
        return 0;
    type = text_field_or(scaling, "rope_type", text_field_or(scaling, "type", "default"));
    require(strcmp(type, "default") == 0 || strcmp(type, "yarn") == 0,
            "the rotary type is %s, but default or yarn is required", type);
    if (strcmp(type, "default") == 0 || strcmp(applies, "never") == 0)
        return 0;
    if (strcmp(applies, "config") == 0)
        return 1;
    require(strcmp(applies, "beyond_original") == 0, "the choice yarn_applies is %s, which is not known",
            applies);
    longest = number_field_or(c->choices, "max_seq_len", number_field(c->config, "max_position_embeddings"));
    return longest > number_field(scaling, "original_max_position_embeddings");
}

/* The pair whose wave makes so many turns in the original context, as a real number. */
static double dimension(double turns, double width, double theta, double original)
{
    return width * log(original / (turns * 2.0 * PI)) / (2.0 * log(theta));
}

/* ROPE-3: from which pair on frequencies are divided in part, and from which on in full. */
static void ramp_of(const Json *yarn, double width, double theta, double *low, double *high)
{
    double original = number_field(yarn, "original_max_position_embeddings");
    double fast = number_field_or(yarn, "beta_fast", 32.0), slow = number_field_or(yarn, "beta_slow", 1.0);

    require(original >= 1.0 && fast > 0.0 && slow > 0.0,
            "original_max_position_embeddings, beta_fast and beta_slow are %g, %g and %g, not positive",
            original, fast, slow);
    *low = fmax(floor(dimension(fast, width, theta, original)), 0.0);
    *high = fmin(ceil(dimension(slow, width, theta, original)), width - 1.0);
    if (*high == *low)
        *high += 0.001;
}

/* ROPE-2 and ROPE-3. */
static Matrix frequencies(size_t width, double theta, const Json *yarn)
{
    Matrix inv_freq = matrix_new(1, width / 2);
    double low = 0.0, high = 0.0, factor = 1.0;
    size_t m;

    if (yarn != NULL) {
        ramp_of(yarn, (double)width, theta, &low, &high);
        factor = number_field(yarn, "factor");
        require(factor >= 1.0, "YaRN's factor is %g, but at least 1 is required", factor);
    }
    for (m = 0; m < width / 2; m++) {
        double frequency = pow(theta, -2.0 * (double)m / (double)width);
        if (yarn != NULL) {
            double ramp = fmin(fmax(((double)m - low) / (high - low), 0.0), 1.0);
            frequency = frequency / factor * ramp + frequency * (1.0 - ramp);
        }
        inv_freq.values[m] = (float)frequency;
    }
    return inv_freq;
}

/* ROPE-4. */
static double mscale(double factor, double m)
{
    return factor <= 1.0 ? 1.0 : 0.1 * m * log(factor) + 1.0;
}

static double cos_sin_factor(const Case *c, const Json *yarn)
{
    double factor = number_field(yarn, "factor");
    double m = number_field_or(yarn, "mscale", 0.0), all = number_field_or(yarn, "mscale_all_dim", 0.0);
    const char *zero = json_get(c->choices, "yarn_mscale_zero", JSON_STRING)->text;

    if (m != 0.0 && all != 0.0)
        return mscale(factor, m) / mscale(factor, all);
    if (strcmp(zero, "hf") == 0)
        return mscale(factor, 1.0);
    require(strcmp(zero, "remote") == 0, "the choice yarn_mscale_zero is %s, which is not known", zero);
    return mscale(factor, number_field_or(yarn, "mscale", 1.0)) / mscale(factor, all);
}

static double softmax_scale(const Case *c, const Json *yarn)
{
    size_t width = size_field(c->config, "qk_nope_head_dim") + size_field(c->config, "qk_rope_head_dim");
    double scale = 1.0 / sqrt((double)width), all, factor;

    if (yarn == NULL)
        return scale;
    all = number_field_or(yarn, "mscale_all_dim", 0.0);
    factor = number_field(yarn, "factor");
    return all == 0.0 ? scale : scale * mscale(factor, all) * mscale(factor, all);
}

/* YaRN's fields; NULL where it does not apply. */
static const Json *yarn_of(const Case *c)
{
    const Json *scaling = json_find(c->config, "rope_scaling");

    return yarn_applies(c, scaling) ? scaling : NULL;
}

/* ROPE-5. */
static float angle(float position, float inv_freq)
{
    return position * inv_freq;
}

static Tables tables(const Case *c)
{
    Tables r;
    const Json *yarn = yarn_of(c);
    double theta = number_field(c->config, "rope_theta");
    size_t count, t, m;
    const int64_t *positions = case_integers(c, "position_ids", &count);
    float factor = yarn == NULL ? 1.0f : (float)cos_sin_factor(c, yarn);

    r.width = size_field(c->config, "qk_rope_head_dim");
    require(r.width % 2 == 0, "qk_rope_head_dim is %lu, but an even number is required",
            (unsigned long)r.width);
    require(theta > 1.0, "rope_theta is %g, but more than 1 is required", theta);
    r.inv_freq = frequencies(r.width, theta, yarn);
    r.cos = matrix_new(count, r.width / 2);
    r.sin = matrix_new(count, r.width / 2);
    for (t = 0; t < count; t++)
        for (m = 0; m < r.width / 2; m++) {
            float turned = angle((float)positions[t], r.inv_freq.values[m]);
            r.cos.values[t * (r.width / 2) + m] = cosf(turned) * factor;
            r.sin.values[t * (r.width / 2) + m] = sinf(turned) * factor;
        }
    return r;
}

/* ROPE-6, in place: rows of heads x (T, H R) turn by sign times their angles. */
static void rotate(Matrix x, const Tables *r, int interleaved, float sign)
{
    size_t half = r->width / 2, heads = x.columns / r->width, t, h, m;

    for (t = 0; t < x.rows; t++)
        for (h = 0; h < heads; h++)
            for (m = 0; m < half; m++) {
                float *head = x.values + t * x.columns + h * r->width;
                float *first = head + (interleaved ? 2 * m : m);
                float *second = head + (interleaved ? 2 * m + 1 : m + half);
                float cos = r->cos.values[t * half + m], sin = sign * r->sin.values[t * half + m];
                float turned = *first * cos - *second * sin;
                *second = *first * sin + *second * cos;
                *first = turned;
            }
}

/* An input (T, H, R) as T rows. */
static Matrix heads_of(const Case *c, const char *name, const Tables *r)
{
    Matrix x = case_input(c, name, r->width);

    require(x.rows % r->cos.rows == 0,
            "the tensor %s has %lu heads in all, which is no multiple of %lu positions", name,
            (unsigned long)x.rows, (unsigned long)r->cos.rows);
    x.columns *= x.rows / r->cos.rows;
    x.rows = r->cos.rows;
    return x;
}

void rope_run(Case *c)
{
    static const char *const NAMES[] = {"q_pe", "k_pe"};
    Tables r = tables(c);
    int interleaved = flag_field_or(c->config, "rope_interleave", 1), i;

    for (i = 0; i < 2; i++) {
        Matrix x = heads_of(c, NAMES[i], &r);
        rotate(x, &r, interleaved, 1.0f);
        case_output(c, joined("%s.%s", c->path, NAMES[i]), x);
    }
    for (i = 0; i < 2 && case_backward(c); i++) { /* ROPE-7 */
        Matrix dy = heads_of(c, joined("d%s", NAMES[i]), &r);
        rotate(dy, &r, interleaved, -1.0f);
        case_output(c, joined("grad.%s", NAMES[i]), dy);
    }
}

void rope_tables_run(Case *c)
{
    Tables r = tables(c);
    Matrix scale = matrix_new(1, 1);

    scale.values[0] = (float)softmax_scale(c, yarn_of(c));
    case_output(c, joined("%s.inv_freq", c->path), r.inv_freq);
    case_output(c, joined("%s.cos", c->path), r.cos);
    case_output(c, joined("%s.sin", c->path), r.sin);
    case_output(c, joined("%s.softmax_scale", c->path), scale);
}

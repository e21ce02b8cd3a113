/* RMSNorm. NORM-1: y = x / sqrt(mean(x^2) + eps) * gain, row by row. */

#include "operations.h"
#include "process.h"

#include <math.h>

/* x (T, D), gain (1, D) -> y (T, D); inverse (T, 1) is 1 / rms of every row. */
static Matrix forward(Matrix x, Matrix gain, float eps, Matrix inverse)
{
    Matrix y = matrix_new(x.rows, x.columns);
    size_t t, d;

    for (t = 0; t < x.rows; t++) {
        const float *row = x.values + t * x.columns;
        float mean = dot(row, row, x.columns) / (float)x.columns;
        inverse.values[t] = 1.0f / sqrtf(mean + eps);
        for (d = 0; d < x.columns; d++)
            y.values[t * x.columns + d] = row[d] * inverse.values[t] * gain.values[d];
    }
    return y;
}

/* NORM-2. dy (T, D) -> dx (T, D); adds up dgain (1, D). */
static Matrix backward(Matrix dy, Matrix x, Matrix gain, Matrix inverse, Matrix dgain)
{
    Matrix dx = matrix_new(x.rows, x.columns);
    size_t t, d;

    for (t = 0; t < x.rows; t++) {
        const float *x_row = x.values + t * x.columns, *dy_row = dy.values + t * x.columns;
        float scale = inverse.values[t], mean = 0.0f;
        for (d = 0; d < x.columns; d++) {
            float normed = x_row[d] * scale;
            dgain.values[d] += dy_row[d] * normed;
            mean += dy_row[d] * gain.values[d] * normed;
        }
        mean /= (float)x.columns;
        for (d = 0; d < x.columns; d++)
            dx.values[t * x.columns + d] = scale * (dy_row[d] * gain.values[d] - x_row[d] * scale * mean);
    }
    return dx;
}

void norm_run(Case *c)
{
    size_t width = case_width(c, "x");
    Matrix x = case_input(c, "x", width);
    Matrix gain = case_input_of(c, joined("%s.weight", c->path), 1, width);
    Matrix inverse = matrix_new(x.rows, 1);
    float eps = (float)number_field(json_get(c->root, "arguments", JSON_OBJECT), "eps");

    case_output(c, c->path, forward(x, gain, eps, inverse));
    if (case_backward(c)) {
        Matrix dy = case_input_of(c, "dy", x.rows, width), dgain = matrix_new(1, width);
        case_output(c, "grad.x", backward(dy, x, gain, inverse, dgain));
        case_output(c, joined("grad.%s.weight", c->path), dgain);
    }
}

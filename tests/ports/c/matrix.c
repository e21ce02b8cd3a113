/* See matrix.h. Sums are taken in float. */

#include "matrix.h"

#include "process.h"

#include <math.h>

/* Partial sums of a long one. A single one would be 4e-5 too small for the squares of norm/hidden: they are
   odd or multiples of 4 (times a power of two), so that rounding a large sum mostly drops a 1. */
#define LANES 8

Matrix matrix_new(size_t rows, size_t columns)
{
    Matrix m = {rows, columns, NULL};

    require(columns == 0 || rows <= MEMORY_LIMIT / columns,
            "a matrix of %lu rows and %lu columns is too large", (unsigned long)rows, (unsigned long)columns);
    m.values = allocate(rows * columns, sizeof *m.values);
    return m;
}

float dot(const float *a, const float *b, size_t count)
{
    float parts[LANES] = {0.0f}, sum = 0.0f;
    size_t i;

    for (i = 0; i < count; i++)
        parts[i % LANES] += a[i] * b[i];
    for (i = 0; i < LANES; i++)
        sum += parts[i];
    return sum;
}

Matrix matrix_times_transpose(Matrix a, Matrix b)
{
    Matrix out = matrix_new(a.rows, b.rows);
    size_t m, n;

    for (m = 0; m < a.rows; m++)
        for (n = 0; n < b.rows; n++)
            out.values[m * b.rows + n] = dot(a.values + m * a.columns, b.values + n * b.columns, a.columns);
    return out;
}

/* to += factor * row */
static void add_scaled(float *to, float factor, const float *row, size_t count)
{
    size_t i;

    for (i = 0; i < count; i++)
        to[i] += factor * row[i];
}

Matrix matrix_times(Matrix a, Matrix b)
{
    Matrix out = matrix_new(a.rows, b.columns);
    size_t m, k;

    for (m = 0; m < a.rows; m++)
        for (k = 0; k < b.rows; k++)
            add_scaled(out.values + m * b.columns, a.values[m * b.rows + k], b.values + k * b.columns,
                       b.columns);
    return out;
}

Matrix matrix_transpose_times(Matrix a, Matrix b)
{
    Matrix out = matrix_new(a.columns, b.columns);
    size_t k, m;

    for (k = 0; k < a.rows; k++)
        for (m = 0; m < a.columns; m++)
            add_scaled(out.values + m * b.columns, a.values[k * a.columns + m], b.values + k * b.columns,
                       b.columns);
    return out;
}

float sigmoid(float x)
{
    return 1.0f / (1.0f + expf(-x));
}

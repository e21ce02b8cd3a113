/* Rows of floats, and the four contractions that the operations need. */

#ifndef MATRIX_H
#define MATRIX_H

#include <stddef.h>

/* An array as rows of its last axis. */
typedef struct {
    size_t rows, columns;
    float *values;
} Matrix;

Matrix matrix_new(size_t rows, size_t columns);

/* a (M, K), b (N, K) -> a b^T (M, N): y = x w^T for a weight (out, in). */
Matrix matrix_times_transpose(Matrix a, Matrix b);

/* a (M, K), b (K, N) -> a b (M, N): dx = dy w. */
Matrix matrix_times(Matrix a, Matrix b);

/* a (K, M), b (K, N) -> a^T b (M, N): dw = dy^T x. */
Matrix matrix_transpose_times(Matrix a, Matrix b);

/* The inner product of two rows. */
float dot(const float *a, const float *b, size_t count);

/* 1 / (1 + exp(-x)) */
float sigmoid(float x);

#endif

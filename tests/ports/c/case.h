/* A golden case: case.json and inputs.safetensors of a folder, and the tensors that will be written. */

#ifndef CASE_H
#define CASE_H

#include "json.h"
#include "matrix.h"
#include "safetensors.h"

#include <stdint.h>

typedef struct {
    const char *component, *kind;
    const char *path;             /* of the module in the checkpoint */
    const Json *root, *config, *choices;
    Tensors inputs, outputs;
} Case;

/* Reads case.json. */
Case case_read(const char *folder);

/* Reads inputs.safetensors. */
void case_read_inputs(Case *c, const char *folder);

/* The case has gradients, for given cotangents. */
int case_backward(const Case *c);

/* Fields of an object: with a default where one is given, otherwise required. */
size_t size_field(const Json *object, const char *key);
double number_field(const Json *object, const char *key);
double number_field_or(const Json *object, const char *key, double absent);
int flag_field_or(const Json *object, const char *key, int absent);
const char *text_field_or(const Json *object, const char *key, const char *absent);

/* An input or weight as rows of `columns` numbers. */
Matrix case_input(const Case *c, const char *name, size_t columns);

/* The same where the number of rows is known. */
Matrix case_input_of(const Case *c, const char *name, size_t rows, size_t columns);

/* The width of the last axis of an input. */
size_t case_width(const Case *c, const char *name);

/* An input of integers, and how many. */
const int64_t *case_integers(const Case *c, const char *name, size_t *count);

/* Gives an output. One that case.json does not ask for is left out. */
void case_output(Case *c, const char *name, Matrix values);
void case_output_integers(Case *c, const char *name, const int64_t *values, size_t count);

#endif

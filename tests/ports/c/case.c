/* See case.h. */

#include "case.h"

#include "process.h"

#include <string.h>

Case case_read(const char *folder)
{
    Case c = {0};
    size_t length;
    const char *path = joined("%s/case.json", folder);
    const unsigned char *text = read_file(path, JSON_LONGEST, &length);

    c.root = json_parse(text, length, path);
    c.kind = json_get(c.root, "kind", JSON_STRING)->text;
    c.component = json_get(c.root, "component", JSON_STRING)->text;
    c.outputs.items = allocate(json_get(c.root, "tensors", JSON_ARRAY)->count, sizeof *c.outputs.items);
    return c;
}

void case_read_inputs(Case *c, const char *folder)
{
    c->path = json_get(c->root, "path", JSON_STRING)->text;
    c->config = json_get(c->root, "config", JSON_OBJECT);
    c->choices = json_get(c->root, "choices", JSON_OBJECT);
    c->inputs = safetensors_read(joined("%s/inputs.safetensors", folder));
}

int case_backward(const Case *c)
{
    return strcmp(c->kind, "vjp") == 0;
}

size_t size_field(const Json *object, const char *key)
{
    size_t size = json_size(json_get(object, key, JSON_NUMBER), key);

    require(size > 0, "the field %s is 0, but at least 1 is required", key);
    return size;
}

double number_field(const Json *object, const char *key)
{
    return json_get(object, key, JSON_NUMBER)->number;
}

double number_field_or(const Json *object, const char *key, double absent)
{
    return json_find(object, key) == NULL ? absent : number_field(object, key);
}

int flag_field_or(const Json *object, const char *key, int absent)
{
    const Json *field = json_find(object, key);

    require(field == NULL || field->type == JSON_TRUE || field->type == JSON_FALSE,
            "the field %s is neither true nor false", key);
    return field == NULL ? absent : field->type == JSON_TRUE;
}

const char *text_field_or(const Json *object, const char *key, const char *absent)
{
    return json_find(object, key) == NULL ? absent : json_get(object, key, JSON_STRING)->text;
}

size_t case_width(const Case *c, const char *name)
{
    const Tensor *t = safetensors_get(&c->inputs, name);

    require(t->rank > 0 && t->count > 0, "the tensor %s is empty or has no axes", name);
    return t->rank == 0 ? 0 : t->shape[t->rank - 1];
}

Matrix case_input(const Case *c, const char *name, size_t columns)
{
    const Tensor *t = safetensors_get(&c->inputs, name);
    Matrix m = {0, columns, NULL};

    require(case_width(c, name) == columns, "the tensor %s has rows of %lu numbers, but %lu are required",
            name, (unsigned long)case_width(c, name), (unsigned long)columns);
    m.rows = t->count / columns;
    m.values = safetensors_floats(t);
    return m;
}

Matrix case_input_of(const Case *c, const char *name, size_t rows, size_t columns)
{
    Matrix m = case_input(c, name, columns);

    require(m.rows == rows, "the tensor %s has %lu rows, but %lu are required", name, (unsigned long)m.rows,
            (unsigned long)rows);
    return m;
}

const int64_t *case_integers(const Case *c, const char *name, size_t *count)
{
    const Tensor *t = safetensors_get(&c->inputs, name);

    *count = t->count;
    return safetensors_integers(t);
}

static int is_output(const Json *description)
{
    const char *role = json_get(description, "role", JSON_STRING)->text;

    return strcmp(role, "required") == 0 || strcmp(role, "probe") == 0;
}

/* The description of an output in case.json; NULL when there is none. */
static const Json *described(const Case *c, const char *name)
{
    const Json *t = json_get(c->root, "tensors", JSON_ARRAY)->first;

    while (t != NULL && (strcmp(json_get(t, "name", JSON_STRING)->text, name) != 0 || !is_output(t)))
        t = t->next;
    return t;
}

/* A place for an output, with the shape that case.json says; NULL for what it does not ask for. */
static Tensor *placed(Case *c, const char *name, Dtype dtype, size_t count)
{
    const Json *description = described(c, name), *axis;
    Tensor *t;
    size_t asked = 1, i;

    if (description == NULL)
        return NULL;
    for (i = 0; i < c->outputs.count; i++)
        require(strcmp(c->outputs.items[i].name, name) != 0, "two outputs of this case are named %s", name);
    t = &c->outputs.items[c->outputs.count++];
    t->name = name;
    t->dtype = dtype;
    t->count = count;
    for (axis = json_get(description, "shape", JSON_ARRAY)->first; axis != NULL; axis = axis->next) {
        require(t->rank < RANK_LIMIT, "the tensor %s of case.json has more than %d axes", name, RANK_LIMIT);
        t->shape[t->rank] = json_size(axis, "an axis of a tensor");
        require(t->shape[t->rank] == 0 || asked <= MEMORY_LIMIT / t->shape[t->rank],
                "the tensor %s of case.json is too large", name);
        asked *= t->shape[t->rank++];
    }
    require(asked == count, "case.json asks for %lu numbers of %s, but its inputs give %lu",
            (unsigned long)asked, name, (unsigned long)count);
    return t;
}

void case_output(Case *c, const char *name, Matrix values)
{
    size_t count = values.rows * values.columns;
    Tensor *t = placed(c, name, F32, count);

    if (t != NULL)
        t->bytes = safetensors_encode_floats(values.values, count);
}

void case_output_integers(Case *c, const char *name, const int64_t *values, size_t count)
{
    Tensor *t = placed(c, name, I64, count);

    if (t != NULL)
        t->bytes = safetensors_encode_integers(values, count);
}

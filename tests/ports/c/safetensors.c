/* See safetensors.h. What a header says is checked before anything is read or allocated by it. */

#include "safetensors.h"

#include "json.h"
#include "process.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LENGTH_BYTES 8

static const char *const NAMES[DTYPES] = {"BF16", "F32", "F64", "I64"};
static const size_t WIDTHS[DTYPES] = {2, 4, 8, 8};

static uint64_t load(const unsigned char *bytes, size_t width)
{
    uint64_t value = 0;

    while (width-- > 0)
        value = value << 8 | bytes[width];
    return value;
}

static void store(unsigned char *bytes, size_t width, uint64_t value)
{
    size_t i;

    for (i = 0; i < width; i++, value >>= 8)
        bytes[i] = (unsigned char)(value & 0xFF);
}

static Dtype dtype_of(const Json *name, const char *tensor)
{
    int dtype = 0;

    while (dtype < DTYPES && strcmp(name->text, NAMES[dtype]) != 0)
        dtype++;
    require(dtype < DTYPES, "tensor %s has dtype %s, but BF16, F32, F64 or I64 is required", tensor,
            name->text);
    return (Dtype)dtype;
}

static Tensor described(const Json *entry, const unsigned char *data, size_t length)
{
    Tensor t = {0};
    const Json *shape, *offsets, *axis;

    t.name = entry->key;
    require(entry->type == JSON_OBJECT, "the header entry of tensor %s is not an object", t.name);
    t.dtype = dtype_of(json_get(entry, "dtype", JSON_STRING), t.name);
    shape = json_get(entry, "shape", JSON_ARRAY);
    require(shape->count <= RANK_LIMIT, "tensor %s has %lu axes, but at most %d are allowed", t.name,
            (unsigned long)shape->count, RANK_LIMIT);
    t.count = 1;
    for (axis = shape->first; axis != NULL; axis = axis->next) {
        size_t size = json_size(axis, "an axis of a tensor");
        require(size == 0 || t.count <= length / size, "tensor %s is larger than its file", t.name);
        t.shape[t.rank++] = size;
        t.count *= size;
    }
    offsets = json_get(entry, "data_offsets", JSON_ARRAY);
    require(offsets->count == 2, "tensor %s has %lu data_offsets, but 2 are required", t.name,
            (unsigned long)offsets->count);
    t.begin = json_size(offsets->first, "a data offset");
    t.end = json_size(offsets->first->next, "a data offset");
    require(t.begin <= t.end && t.end <= length, "tensor %s ends outside of its file", t.name);
    require((t.end - t.begin) / WIDTHS[t.dtype] == t.count && (t.end - t.begin) % WIDTHS[t.dtype] == 0,
            "tensor %s has %lu bytes, which is not what its shape and dtype need", t.name,
            (unsigned long)(t.end - t.begin));
    t.bytes = data + t.begin;
    return t;
}

static int by_place(const void *a, const void *b)
{
    const Tensor *left = a, *right = b;

    if (left->begin != right->begin)
        return left->begin < right->begin ? -1 : 1;
    return left->end < right->end ? -1 : left->end > right->end;
}

Tensors safetensors_read(const char *path)
{
    Tensors tensors = {NULL, 0};
    size_t length, size, end = 0, i;
    const unsigned char *file = read_file(path, MEMORY_LIMIT / 2, &length);
    const Json *header, *entry;
    uint64_t stated;

    require(length >= LENGTH_BYTES, "%s has %lu bytes, but a safetensors file has at least 8", path,
            (unsigned long)length);
    stated = load(file, LENGTH_BYTES);
    require(stated <= length - LENGTH_BYTES, "%s says that its header has %.0f bytes, but %lu follow", path,
            (double)stated, (unsigned long)(length - LENGTH_BYTES));
    size = (size_t)stated;
    header = json_parse(file + LENGTH_BYTES, size, path);
    require(header->type == JSON_OBJECT, "the header of %s is not a JSON object", path);
    tensors.items = allocate(header->count, sizeof *tensors.items);
    length -= LENGTH_BYTES + size;
    for (entry = header->first; entry != NULL; entry = entry->next)
        if (strcmp(entry->key, "__metadata__") != 0)
            tensors.items[tensors.count++] = described(entry, file + LENGTH_BYTES + size, length);
    if (tensors.count > 1)
        qsort(tensors.items, tensors.count, sizeof *tensors.items, by_place);
    for (i = 0; i < tensors.count; end = tensors.items[i++].end)
        require(tensors.items[i].begin == end, "%s has a hole or an overlap before tensor %s", path,
                tensors.items[i].name);
    require(end == length, "%s has %lu bytes of tensors, but its header describes %lu", path,
            (unsigned long)length, (unsigned long)end);
    return tensors;
}

const Tensor *safetensors_get(const Tensors *tensors, const char *name)
{
    size_t i = 0;

    while (i < tensors->count && strcmp(tensors->items[i].name, name) != 0)
        i++;
    require(i < tensors->count, "the tensor %s is absent, but it is required", name);
    return &tensors->items[i];
}

static float from_bits(uint32_t bits)
{
    float value;

    memcpy(&value, &bits, sizeof value);
    return value;
}

static double from_wide_bits(uint64_t bits)
{
    double value;

    memcpy(&value, &bits, sizeof value);
    return value;
}

float *safetensors_floats(const Tensor *tensor)
{
    float *values = allocate(tensor->count, sizeof *values);
    size_t width = WIDTHS[tensor->dtype], i;

    require(tensor->dtype != I64, "tensor %s has dtype I64, but BF16, F32 or F64 is required", tensor->name);
    for (i = 0; i < tensor->count; i++) {
        uint64_t bits = load(tensor->bytes + i * width, width);
        values[i] = tensor->dtype == F64   ? (float)from_wide_bits(bits)
                    : tensor->dtype == F32 ? from_bits((uint32_t)bits)
                                           : from_bits((uint32_t)bits << 16);
        require(isfinite(values[i]), "element %lu of tensor %s is not finite", (unsigned long)i,
                tensor->name);
    }
    return values;
}

int64_t *safetensors_integers(const Tensor *tensor)
{
    int64_t *values = allocate(tensor->count, sizeof *values);
    size_t i;

    require(tensor->dtype == I64, "tensor %s has dtype %s, but I64 is required", tensor->name,
            NAMES[tensor->dtype]);
    for (i = 0; i < tensor->count; i++) {
        uint64_t bits = load(tensor->bytes + i * 8, 8);
        memcpy(&values[i], &bits, sizeof bits); /* int64_t is two's complement */
    }
    return values;
}

const unsigned char *safetensors_encode_floats(const float *values, size_t count)
{
    unsigned char *bytes = allocate(count, 4);
    uint32_t bits;
    size_t i;

    for (i = 0; i < count; i++) {
        memcpy(&bits, &values[i], sizeof bits);
        store(bytes + i * 4, 4, bits);
    }
    return bytes;
}

const unsigned char *safetensors_encode_integers(const int64_t *values, size_t count)
{
    unsigned char *bytes = allocate(count, 8);
    size_t i;

    for (i = 0; i < count; i++)
        store(bytes + i * 8, 8, (uint64_t)values[i]);
    return bytes;
}

/* A JSON string; printable characters are left as they are. */
static const char *quoted(const char *text)
{
    char *to = allocate(strlen(text) * 6 + 3, 1), *start = to;

    *to++ = '"';
    for (; *text != '\0'; text++) {
        unsigned char c = (unsigned char)*text;
        if (c < ' ' || c == '"' || c == '\\')
            to += sprintf(to, "\\u%04x", c);
        else
            *to++ = (char)c;
    }
    *to++ = '"';
    return start;
}

static const char *header_of(const Tensors *tensors)
{
    const char *header = "{";
    size_t begin = 0, i, axis;

    for (i = 0; i < tensors->count; i++) {
        const Tensor *t = &tensors->items[i];
        size_t end = begin + t->count * WIDTHS[t->dtype];
        const char *shape = "";
        for (axis = 0; axis < t->rank; axis++)
            shape = joined("%s%s%lu", shape, axis > 0 ? "," : "", (unsigned long)t->shape[axis]);
        header = joined("%s%s%s:{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%lu,%lu]}", header,
                        i > 0 ? "," : "", quoted(t->name), NAMES[t->dtype], shape, (unsigned long)begin,
                        (unsigned long)end);
        begin = end;
    }
    while (strlen(header) % 8 != 7) /* what follows begins at a multiple of 8 */
        header = joined("%s ", header);
    return joined("%s}", header);
}

void safetensors_write(const char *path, const Tensors *tensors)
{
    const char *header = header_of(tensors);
    unsigned char length[LENGTH_BYTES];
    FILE *file = fopen(path, "wb");
    int written;
    size_t i;

    require(file != NULL, "%s cannot be opened for writing", path);
    store(length, sizeof length, strlen(header));
    written = fwrite(length, sizeof length, 1, file) == 1 && fputs(header, file) >= 0;
    for (i = 0; i < tensors->count; i++) {
        size_t bytes = tensors->items[i].count * WIDTHS[tensors->items[i].dtype];
        written = written && fwrite(tensors->items[i].bytes, 1, bytes, file) == bytes;
    }
    written = fclose(file) == 0 && written;
    if (!written)
        remove(path);
    require(written, "%s cannot be written", path);
}

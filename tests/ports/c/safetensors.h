/* Reading and writing safetensors files: a length of 8 bytes, a JSON object, the bytes of the tensors.

   Bytes are decoded one by one, so the byte order of the machine does not matter. */

#ifndef SAFETENSORS_H
#define SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#define RANK_LIMIT 8

typedef enum { BF16, F32, F64, I64, DTYPES } Dtype;

typedef struct {
    const char *name;
    Dtype dtype;
    size_t rank, shape[RANK_LIMIT];
    size_t count;               /* of elements */
    size_t begin, end;          /* of its bytes, counted from the end of the header */
    const unsigned char *bytes; /* little-endian, in C order */
} Tensor;

typedef struct {
    Tensor *items;
    size_t count;
} Tensors;

/* All tensors of a file. Ends the process when the file is malformed. */
Tensors safetensors_read(const char *path);

/* The tensor of that name; ends the process when there is none. */
const Tensor *safetensors_get(const Tensors *tensors, const char *name);

/* The numbers of a tensor of a floating-point type, rounded to float; they have to be finite. */
float *safetensors_floats(const Tensor *tensor);

/* The numbers of a tensor of type I64. */
int64_t *safetensors_integers(const Tensor *tensor);

/* The bytes of a tensor of type F32 or I64. */
const unsigned char *safetensors_encode_floats(const float *values, size_t count);
const unsigned char *safetensors_encode_integers(const int64_t *values, size_t count);

/* Writes name, dtype, shape and bytes of every tensor. */
void safetensors_write(const char *path, const Tensors *tensors);

#endif

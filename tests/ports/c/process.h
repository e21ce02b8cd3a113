/* How this process ends and what it may use: errors of one sentence, bounded memory, whole files.

   A run is one case, so nothing is freed before the end, and everything is freed there. */

#ifndef PROCESS_H
#define PROCESS_H

#include <stddef.h>

#define MEMORY_LIMIT ((size_t)1 << 30)

/* Unless it holds, the sentence goes to standard error and the process ends with status 1. */
void require(int holds, const char *sentence, ...);

/* Zeroed memory for count things of a size; a product that overflows or exceeds the limit is refused. */
void *allocate(size_t count, size_t size);

/* Text made as by printf. */
char *joined(const char *format, ...);

/* The bytes of a file of at most limit bytes, and a NUL that is not counted. */
unsigned char *read_file(const char *path, size_t limit, size_t *length);

#endif

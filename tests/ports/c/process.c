/* See process.h. */

#include "process.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#define LONGEST_LINE 400

/* Stands before every allocation; the other members only align what follows. */
typedef union Block {
    union Block *previous;
    long long integer;
    long double real;
} Block;

static Block *newest;
static size_t used;

void require(int holds, const char *sentence, ...)
{
    char line[LONGEST_LINE];
    va_list arguments;
    char *c;

    if (holds)
        return;
    va_start(arguments, sentence);
    vsnprintf(line, sizeof line, sentence, arguments);
    va_end(arguments);
    for (c = line; *c != '\0'; c++) /* names from a file stand in it */
        if ((unsigned char)*c < ' ')
            *c = '?';
    fprintf(stderr, "port: %s.\n", line);
    exit(EXIT_FAILURE);
}

static void release(void)
{
    while (newest != NULL) {
        Block *previous = newest->previous;
        free(newest);
        newest = previous;
    }
}

void *allocate(size_t count, size_t size)
{
    size_t left = MEMORY_LIMIT - used;
    Block *block;

    require(sizeof *block <= left && (size == 0 || count <= (left - sizeof *block) / size),
            "the case needs more than the %lu MiB of memory that are allowed",
            (unsigned long)(MEMORY_LIMIT >> 20));
    block = calloc(1, sizeof *block + count * size);
    require(block != NULL, "there is no memory for %lu more bytes", (unsigned long)(count * size));
    if (newest == NULL)
        require(atexit(release) == 0, "the clean-up at exit cannot be registered");
    block->previous = newest;
    newest = block;
    used += sizeof *block + count * size;
    return block + 1;
}

char *joined(const char *format, ...)
{
    va_list arguments;
    int length;
    char *text;

    va_start(arguments, format);
    length = vsnprintf(NULL, 0, format, arguments);
    va_end(arguments);
    require(length >= 0, "the text %s cannot be formatted", format);
    text = allocate((size_t)length + 1, 1);
    va_start(arguments, format);
    vsnprintf(text, (size_t)length + 1, format, arguments);
    va_end(arguments);
    return text;
}

unsigned char *read_file(const char *path, size_t limit, size_t *length)
{
    FILE *file = fopen(path, "rb");
    unsigned char *bytes;
    long size;

    require(file != NULL, "%s cannot be opened", path);
    size = fseek(file, 0, SEEK_END) == 0 ? ftell(file) : -1;
    require(size >= 0 && fseek(file, 0, SEEK_SET) == 0, "%s is no file whose size can be told", path);
    require((unsigned long)size <= limit, "%s has %ld bytes, but at most %lu are allowed", path, size,
            (unsigned long)limit);
    bytes = allocate((size_t)size + 1, 1);
    *length = fread(bytes, 1, (size_t)size, file);
    require(fclose(file) == 0 && *length == (size_t)size, "%s cannot be read", path);
    return bytes;
}

/* A strict reader of small JSON texts (RFC 8259): a tree in memory, bounded in length and depth. */

#ifndef JSON_H
#define JSON_H

#include <stddef.h>

#define JSON_LONGEST ((size_t)4 << 20)
#define JSON_DEEPEST 32

typedef enum { JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT } JsonType;

typedef struct Json {
    JsonType type;
    const char *key;    /* of a member of an object, otherwise NULL */
    const char *text;   /* of a string, UTF-8 without U+0000 */
    double number;      /* of a number */
    size_t count;       /* elements of an array, members of an object */
    struct Json *first; /* the first of them */
    struct Json *next;  /* the one after this in the same array or object */
} Json;

/* Ends the process when the text is not one JSON value, has a key twice or is out of bounds. */
const Json *json_parse(const unsigned char *text, size_t length, const char *where);

/* The member of that key and type. Ends the process when there is none. */
const Json *json_get(const Json *object, const char *key, JsonType type);

/* The member of that key; NULL when it is absent or null. */
const Json *json_find(const Json *object, const char *key);

/* A number as a size; ends the process when it is not an integer from 0 to 2^30. */
size_t json_size(const Json *number, const char *what);

#endif

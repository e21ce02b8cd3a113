/* See json.h. Recursive descent; every byte is looked at only after the end was. */

#include "json.h"

#include "process.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define LONGEST_NUMBER 63

typedef struct {
    const unsigned char *start, *at, *end;
    const char *where;
    int depth;
} Reader;

static const char *const TYPES[] = {"null", "false", "true", "a number", "a string", "an array", "an object"};

static void expect(const Reader *r, int holds, const char *what)
{
    require(holds, "%s is not JSON at byte %lu, where %s is required", r->where,
            (unsigned long)(r->at - r->start), what);
}

static int peek(const Reader *r)
{
    return r->at < r->end ? *r->at : -1;
}

static int accept(Reader *r, int byte)
{
    if (peek(r) != byte)
        return 0;
    r->at++;
    return 1;
}

static void skip_blanks(Reader *r)
{
    while (peek(r) == ' ' || peek(r) == '\t' || peek(r) == '\n' || peek(r) == '\r')
        r->at++;
}

static void skip_digits(Reader *r)
{
    expect(r, peek(r) >= '0' && peek(r) <= '9', "a digit");
    while (peek(r) >= '0' && peek(r) <= '9')
        r->at++;
}

/* strtod takes more than JSON does, so the grammar is checked here; the locale is "C". */
static double read_number(Reader *r)
{
    const unsigned char *begin = r->at;
    char digits[LONGEST_NUMBER + 1] = "";
    double number;

    accept(r, '-');
    if (!accept(r, '0'))
        skip_digits(r);
    if (accept(r, '.'))
        skip_digits(r);
    if (accept(r, 'e') || accept(r, 'E')) {
        if (!accept(r, '+'))
            accept(r, '-');
        skip_digits(r);
    }
    expect(r, r->at - begin <= LONGEST_NUMBER, "a shorter number");
    memcpy(digits, begin, (size_t)(r->at - begin));
    number = strtod(digits, NULL);
    expect(r, isfinite(number), "a finite number");
    return number;
}

static unsigned read_hex4(Reader *r)
{
    unsigned code = 0;
    int i;

    for (i = 0; i < 4; i++, r->at++) {
        int c = peek(r);
        int digit = c >= '0' && c <= '9' ? c - '0'
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                           : -1;
        expect(r, digit >= 0, "a hexadecimal digit");
        code = code * 16 + (unsigned)digit;
    }
    return code;
}

/* The code point after \u, of one or of a pair of UTF-16 units. */
static unsigned read_escaped(Reader *r)
{
    unsigned code = read_hex4(r), low;

    if (code >= 0xD800 && code < 0xDC00) {
        expect(r, accept(r, '\\') && accept(r, 'u'), "the second half of a pair");
        low = read_hex4(r);
        expect(r, low >= 0xDC00 && low < 0xE000, "the second half of a pair");
        return 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    expect(r, code != 0 && !(code >= 0xDC00 && code < 0xE000), "a character other than U+0000");
    return code;
}

static char *put_utf8(char *to, unsigned code)
{
    if (code < 0x80) {
        *to++ = (char)code;
    } else if (code < 0x800) {
        *to++ = (char)(0xC0 | code >> 6);
        *to++ = (char)(0x80 | (code & 0x3F));
    } else if (code < 0x10000) {
        *to++ = (char)(0xE0 | code >> 12);
        *to++ = (char)(0x80 | (code >> 6 & 0x3F));
        *to++ = (char)(0x80 | (code & 0x3F));
    } else {
        *to++ = (char)(0xF0 | code >> 18);
        *to++ = (char)(0x80 | (code >> 12 & 0x3F));
        *to++ = (char)(0x80 | (code >> 6 & 0x3F));
        *to++ = (char)(0x80 | (code & 0x3F));
    }
    return to;
}

/* An escape is never shorter than its character, so the room between the quotes is enough. */
static const char *read_string(Reader *r)
{
    static const char ESCAPES[] = "\"\\/bfnrt", MEANINGS[] = "\"\\/\b\f\n\r\t";
    const unsigned char *close;
    char *text, *to;

    expect(r, accept(r, '"'), "a string");
    for (close = r->at; close < r->end && *close != '"'; close++)
        close += *close == '\\' && close + 1 < r->end;
    expect(r, close < r->end, "a string that ends");
    text = to = allocate((size_t)(close - r->at) + 1, 1);
    while (!accept(r, '"')) {
        const char *escape;
        expect(r, peek(r) >= 0x20, "a printable character");
        if (!accept(r, '\\')) {
            *to++ = (char)*r->at++;
        } else if (accept(r, 'u')) {
            to = put_utf8(to, read_escaped(r));
        } else {
            escape = peek(r) > 0 ? strchr(ESCAPES, peek(r)) : NULL;
            expect(r, escape != NULL, "an escape");
            if (escape != NULL)
                *to++ = MEANINGS[escape - ESCAPES];
            r->at++;
        }
    }
    return text;
}

static int read_word(Reader *r, const char *word)
{
    size_t length = strlen(word);

    if ((size_t)(r->end - r->at) < length || memcmp(r->at, word, length) != 0)
        return 0;
    r->at += length;
    return 1;
}

static int by_text(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static void require_distinct_keys(const Reader *r, const Json *object)
{
    const char **keys = allocate(object->count, sizeof *keys);
    const Json *member;
    size_t i = 0;

    for (member = object->first; member != NULL; member = member->next)
        keys[i++] = member->key;
    if (object->count > 1)
        qsort(keys, object->count, sizeof *keys, by_text);
    for (i = 1; i < object->count; i++)
        require(strcmp(keys[i - 1], keys[i]) != 0, "%s has the key %s twice in one object", r->where,
                keys[i]);
}

static Json *read_value(Reader *r);

static void read_children(Reader *r, Json *parent, int close)
{
    Json **last = &parent->first;

    require(++r->depth <= JSON_DEEPEST, "%s is nested deeper than %d", r->where, JSON_DEEPEST);
    skip_blanks(r);
    if (!accept(r, close)) {
        do {
            const char *key = NULL;
            skip_blanks(r);
            if (parent->type == JSON_OBJECT) {
                key = read_string(r);
                skip_blanks(r);
                expect(r, accept(r, ':'), "a colon");
            }
            *last = read_value(r);
            (*last)->key = key;
            last = &(*last)->next;
            parent->count++;
        } while (accept(r, ','));
        expect(r, accept(r, close), "a comma or the end of an array or object");
    }
    if (parent->type == JSON_OBJECT)
        require_distinct_keys(r, parent);
    r->depth--;
}

static Json *read_value(Reader *r)
{
    Json *value = allocate(1, sizeof *value);

    skip_blanks(r);
    if (peek(r) == '"') {
        value->type = JSON_STRING;
        value->text = read_string(r);
    } else if (accept(r, '{')) {
        value->type = JSON_OBJECT;
        read_children(r, value, '}');
    } else if (accept(r, '[')) {
        value->type = JSON_ARRAY;
        read_children(r, value, ']');
    } else if (read_word(r, "true")) {
        value->type = JSON_TRUE;
    } else if (read_word(r, "false")) {
        value->type = JSON_FALSE;
    } else if (!read_word(r, "null")) {
        expect(r, peek(r) == '-' || (peek(r) >= '0' && peek(r) <= '9'), "a value");
        value->type = JSON_NUMBER;
        value->number = read_number(r);
    }
    skip_blanks(r);
    return value;
}

const Json *json_parse(const unsigned char *text, size_t length, const char *where)
{
    Reader r = {text, text, text + length, where, 0};
    const Json *value;

    require(length <= JSON_LONGEST, "%s has %lu bytes of JSON, but at most %lu are allowed", where,
            (unsigned long)length, (unsigned long)JSON_LONGEST);
    value = read_value(&r);
    expect(&r, r.at == r.end, "the end");
    return value;
}

const Json *json_find(const Json *object, const char *key)
{
    const Json *member = object->type == JSON_OBJECT ? object->first : NULL;

    while (member != NULL && strcmp(member->key, key) != 0)
        member = member->next;
    return member != NULL && member->type != JSON_NULL ? member : NULL;
}

const Json *json_get(const Json *object, const char *key, JsonType type)
{
    const Json *member = json_find(object, key);

    require(member != NULL, "the field %s is absent, but %s is required", key, TYPES[type]);
    require(member == NULL || member->type == type, "the field %s is %s, but %s is required", key,
            TYPES[member == NULL ? JSON_NULL : member->type], TYPES[type]);
    return member;
}

size_t json_size(const Json *number, const char *what)
{
    double value = number->number;

    require(number->type == JSON_NUMBER && value >= 0 && value <= 1073741824.0 && floor(value) == value,
            "%s is not an integer from 0 to 2^30", what);
    return (size_t)value;
}

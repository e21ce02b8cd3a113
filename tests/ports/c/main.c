/* A port of some operations of DeepSeek-V3 to C99, without any library.

       port CASE_DIR OUTPUT.safetensors

   Status 0: the output is written; 77: the case is not for this port; 1: it failed, with one sentence. */

#include "operations.h"
#include "process.h"

#include <string.h>

#define NOT_FOR_ME 77

static const struct {
    const char *component;
    void (*run)(Case *c);
} OPERATIONS[] = {
    {"norm", norm_run}, {"rope", rope_run}, {"rope_tables", rope_tables_run},
    {"gate", gate_run}, {"mlp", mlp_run},
};

int main(int count, char **arguments)
{
    size_t i = 0, operations = sizeof OPERATIONS / sizeof *OPERATIONS;
    Case c;

    require(count == 3, "the arguments are a case folder and an output file");
    c = case_read(arguments[1]);
    while (i < operations && strcmp(c.component, OPERATIONS[i].component) != 0)
        i++;
    if (i == operations || (strcmp(c.kind, "forward") != 0 && strcmp(c.kind, "vjp") != 0))
        return NOT_FOR_ME;
    case_read_inputs(&c, arguments[1]);
    OPERATIONS[i].run(&c);
    safetensors_write(arguments[2], &c.outputs);
    return 0;
}

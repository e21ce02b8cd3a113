/* One expert. MLP-1: y = down_proj (silu(gate_proj x) * up_proj x), silu(v) = v * sigmoid(v). */

#include "operations.h"
#include "process.h"

typedef struct {
    Matrix gate, up, down; /* weights (I, D), (I, D), (D, I) */
} Weights;

/* gate, up (T, I) -> silu(gate) * up (T, I) */
static Matrix activation(Matrix gate, Matrix up)
{
    Matrix act = matrix_new(gate.rows, gate.columns);
    size_t i;

    for (i = 0; i < gate.rows * gate.columns; i++)
        act.values[i] = gate.values[i] * sigmoid(gate.values[i]) * up.values[i];
    return act;
}

/* MLP-2. dact (T, I) -> dgate, dup (T, I) */
static void activation_backward(Matrix dact, Matrix gate, Matrix up, Matrix dgate, Matrix dup)
{
    size_t i;

    for (i = 0; i < dact.rows * dact.columns; i++) {
        float s = sigmoid(gate.values[i]), silu = gate.values[i] * s;
        dup.values[i] = dact.values[i] * silu;
        dgate.values[i] = dact.values[i] * up.values[i] * (s + silu * (1.0f - s));
    }
}

static void backward(Case *c, Weights w, Matrix x, Matrix gate, Matrix up, Matrix act)
{
    Matrix dy = case_input_of(c, "dy", x.rows, x.columns);
    Matrix dact = matrix_times(dy, w.down);
    Matrix dgate = matrix_new(gate.rows, gate.columns), dup = matrix_new(gate.rows, gate.columns);
    Matrix dx, through_up;
    size_t i;

    activation_backward(dact, gate, up, dgate, dup);
    dx = matrix_times(dgate, w.gate);
    through_up = matrix_times(dup, w.up);
    for (i = 0; i < dx.rows * dx.columns; i++)
        dx.values[i] += through_up.values[i];
    case_output(c, joined("grad.%s.down_proj.weight", c->path), matrix_transpose_times(dy, act));
    case_output(c, joined("grad.%s.gate_proj.weight", c->path), matrix_transpose_times(dgate, x));
    case_output(c, joined("grad.%s.up_proj.weight", c->path), matrix_transpose_times(dup, x));
    case_output(c, "grad.x", dx);
}

void mlp_run(Case *c)
{
    const char *down_name = joined("%s.down_proj.weight", c->path);
    size_t width = case_width(c, "x"), inner = case_width(c, down_name);
    Matrix x = case_input(c, "x", width), gate, up, act, y;
    Weights w;

    w.gate = case_input_of(c, joined("%s.gate_proj.weight", c->path), inner, width);
    w.up = case_input_of(c, joined("%s.up_proj.weight", c->path), inner, width);
    w.down = case_input_of(c, down_name, width, inner);
    gate = matrix_times_transpose(x, w.gate);
    up = matrix_times_transpose(x, w.up);
    act = activation(gate, up);
    y = matrix_times_transpose(act, w.down);
    case_output(c, joined("%s.gate_proj", c->path), gate);
    case_output(c, joined("%s.up_proj", c->path), up);
    case_output(c, joined("%s.act", c->path), act);
    case_output(c, joined("%s.down_proj", c->path), y);
    case_output(c, c->path, y);
    if (case_backward(c))
        backward(c, w, x, gate, up, act);
}

/* What this port computes: each reads the inputs of a case and gives its outputs. Clauses are of SPEC.md. */

#ifndef OPERATIONS_H
#define OPERATIONS_H

#include "case.h"

void norm_run(Case *c);        /* RMSNorm: NORM-1, NORM-2 */
void rope_run(Case *c);        /* the rotation of q_pe and k_pe: ROPE-6, ROPE-7 */
void rope_tables_run(Case *c); /* frequencies, cos, sin and the scale of the softmax: ROPE-1 to ROPE-5 */
void gate_run(Case *c);        /* which experts, and their weights: ROUTE-1 to ROUTE-7, ROUTE-9 */
void mlp_run(Case *c);         /* one expert: MLP-1, MLP-2 */

#endif

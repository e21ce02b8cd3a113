"""Cases of the gradients that each rank of a pipeline makes."""

from refimpl.cases.definition import Definition

GRADIENTS: tuple[Definition, ...] = ()

"""Adapters that run real implementations as ports.  SPEC VERDICT-1.

Each is a command, `python -m refimpl.validate.ports.NAME CASE_DIR OUTPUT.safetensors`, and a module with
`run(case)`.  It builds the implementation's own modules from the case's configuration, loads the case's
weights, and gives what they compute by the names of case.json.  Nothing of the computation is done here.
"""

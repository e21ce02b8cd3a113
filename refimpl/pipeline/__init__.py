"""Pipeline-parallel schedules: generated, checked, simulated, drawn, and executed on a model."""

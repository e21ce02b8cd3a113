"""Makes this folder importable for `support`, and bounds what hypothesis spends."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "refimpl", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("refimpl")

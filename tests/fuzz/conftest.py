"""Number of examples: few and always the same in `make test`, many in `make test-faults`. Nothing is stored."""

import os
from datetime import timedelta

from hypothesis import HealthCheck, settings

_CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "small", max_examples=30, derandomize=True, database=None, deadline=timedelta(seconds=60),
    suppress_health_check=_CHECKS,
)  # fmt: skip
settings.register_profile(
    "large", max_examples=1500, database=None, deadline=timedelta(seconds=60), suppress_health_check=_CHECKS,
    print_blob=True,
)  # fmt: skip
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "small"))

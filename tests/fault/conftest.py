"""No OTEL_* variable of the machine changes a test, and no test's log set-up outlives it."""

from tests.log_fixtures import clean_environment

__all__ = ["clean_environment"]

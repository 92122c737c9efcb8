"""The logs of servers in this process have no reader here."""

from tests.log_fixtures import silent_log

__all__ = ["silent_log"]

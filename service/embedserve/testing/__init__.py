"""Public fakes: what a user of embedserve needs to test against it, and what its own tests use.

Nothing outside tests imports this package.
"""

from embedserve.testing.backends import FakeBackend, FaultPlan, FaultyBackend
from embedserve.testing.clock import ManualClock
from embedserve.testing.tokenizer import tiny_tokenizer

__all__ = ["FakeBackend", "FaultPlan", "FaultyBackend", "ManualClock", "tiny_tokenizer"]

"""Public fakes: what a user of embedserve needs to test against it, and what its own tests use.

Nothing outside tests imports this package. ``embedserve.testing.server`` runs the whole server over these fakes; it is
a module of its own because it needs gRPC, and the fakes do not.
"""

from embedserve.testing.backends import FakeBackend, FaultPlan, FaultyBackend
from embedserve.testing.checkpoint import fake_checkpoint
from embedserve.testing.clock import ManualClock
from embedserve.testing.fault_proxy import FaultProxy, Faults
from embedserve.testing.tokenizer import tiny_tokenizer

__all__ = [
    "FakeBackend",
    "FaultPlan",
    "FaultProxy",
    "Faults",
    "FaultyBackend",
    "ManualClock",
    "fake_checkpoint",
    "tiny_tokenizer",
]

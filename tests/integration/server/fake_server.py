"""``embedserve serve`` with a model that obeys: the same process from the settings to the exit code, without torch.

Signs in a text are orders to the device: ``#`` ends the worker's thread, ``~`` takes 300 ms, ``poison`` raises.
``WARM_UP`` in the environment is ``fail`` or a number of seconds to wait, ``END_MARGIN`` the seconds that a process
which hangs is given beyond its grace.
"""

from __future__ import annotations

import os
import sys
import time

from embedserve import app
from embedserve.cli import main
from embedserve.frontends import supervisor
from embedserve.model.backend import BatchResult, TokenBatch, WarmPass
from embedserve.model.tokenizer import Truncation
from embedserve.testing import FaultPlan, FaultyBackend, fake_checkpoint, tiny_tokenizer


def _id(character: str) -> int:
    return int(tiny_tokenizer().encode([character], truncation=Truncation.NONE).ids[1])


DIE, SLOW = _id("#"), _id("~")
SLOW_NS = 300_000_000


class ObedientBackend(FaultyBackend):
    """Does what the texts say."""

    def warm_up(self, max_batch_tokens: int) -> tuple[WarmPass, ...]:
        order = os.environ.get("WARM_UP", "0")
        if order == "fail":
            raise RuntimeError("the device has no memory left")
        time.sleep(float(order))
        return super().warm_up(max_batch_tokens)

    def __init__(self, plan: FaultPlan) -> None:
        super().__init__(plan)
        # Within the pass as it is measured: admission must learn what it costs.
        self._pass_ns = lambda batch: SLOW_NS if (batch.ids == SLOW).any() else 0

    def embed(self, batch: TokenBatch) -> BatchResult:
        if (batch.ids == DIE).any():
            raise SystemExit("the worker was told to die")
        return super().embed(batch)


def obedient_backend(_checkpoint: object) -> object:
    """What makes the backend: a function of this module, which a process that is spawned can find."""
    return obey


def obey() -> ObedientBackend:
    return ObedientBackend(FaultPlan(raise_on_id=_id("poison")))


if __name__ == "__main__":
    run, checkpoint = app.run, fake_checkpoint()

    def run_fake(config: object) -> int:
        return run(config, make_backend=obedient_backend, checkpoint=checkpoint)  # type: ignore[arg-type]

    app.run = run_fake  # type: ignore[assignment]
    supervisor.END_MARGIN_S = float(os.environ.get("END_MARGIN", supervisor.END_MARGIN_S))  # type: ignore[misc]
    sys.exit(main(["serve", *sys.argv[1:]]))

"""``embedserve serve`` around a model that misbehaves as it is told: by signs in the texts, or for every pass.

Signs: ``!`` aborts, ``$`` reads address 0, ``%`` returns a row too few, ``&`` loses the device, ``@`` ends the worker's
thread with what is no ``Exception``, ``^`` gives NaN, ``*`` takes two seconds, ``=`` never ends, and those of
``tests/integration/server/fake_server.py``. In the environment: ``PASS_MS`` makes each pass take so long, ``GIL_MS``
makes it hold the interpreter for so long, ``TOKEN_US`` adds so much a token, ``MEMORY_TOKENS`` is what fits the device.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time

from embedserve import app
from embedserve.cli import main
from embedserve.model.backend import BatchResult, DeviceLost, PassTimes, TokenBatch, WarmPass
from embedserve.model.tokenizer import Truncation
from embedserve.testing import FaultPlan, fake_checkpoint, tiny_tokenizer
from tests.integration.server.fake_server import ObedientBackend
from tests.integration.server.process import LOOPBACK

SERVER = ("-m", "tests.fault.fault_server", *LOOPBACK)
"""The command for ``running``."""


def token_id(word: str) -> int:
    return int(tiny_tokenizer().encode([word], truncation=Truncation.NONE).ids[1])


ABORT, SEGFAULT, SHORT, LOST, THREAD, NAN, STALL, HANG = (token_id(character) for character in "!$%&@^*=")


class FaultServerBackend(ObedientBackend):
    """Does what the texts and the environment say."""

    def __init__(self) -> None:
        memory = os.environ.get("MEMORY_TOKENS")
        super().__init__(
            FaultPlan(
                raise_on_id=token_id("poison"),
                nan_on_id=NAN,
                memory_tokens=None if memory is None else int(memory),
            )
        )
        self._pass_s = float(os.environ.get("PASS_MS", "0")) / 1e3
        self._token_s = float(os.environ.get("TOKEN_US", "0")) / 1e6
        self._gil_us = int(float(os.environ.get("GIL_MS", "0")) * 1e3)
        # Called through PyDLL, a function keeps the interpreter's lock, as a careless extension would.
        self._usleep = ctypes.PyDLL(None).usleep

    def warm_up(self, max_batch_tokens: int) -> tuple[WarmPass, ...]:
        super().warm_up(max_batch_tokens)
        # What a real backend measures; without it the scheduler would take the first small passes' rate for the most.
        return tuple(
            WarmPass(tokens, tokens, round((self._pass_s + self._token_s * tokens) * 1e9) + 100_000)
            for tokens in (8, max_batch_tokens)
        )

    def embed(self, batch: TokenBatch) -> BatchResult:
        ids = batch.ids
        if (ids == ABORT).any():
            os.abort()
        if (ids == SEGFAULT).any():
            ctypes.string_at(0)
        if (ids == LOST).any():
            raise DeviceLost("CUDA error: an illegal memory access was encountered")
        if (ids == THREAD).any():
            raise KeyboardInterrupt("the worker's thread ends")  # not an Exception: the batch guard does not see it
        begun = time.monotonic_ns()
        if (pause := self._pass_s + self._token_s * len(ids)) > 0:
            time.sleep(pause)
        if (ids == STALL).any():
            time.sleep(2)
        while (ids == HANG).any():
            time.sleep(60)
        if self._gil_us:
            self._usleep(self._gil_us)
        vectors = super().embed(batch).vectors
        end = time.monotonic_ns()
        # The pause is device time: the scheduler learns what a pass costs from these.
        times = PassTimes(begun, begun, begun, end, end, end)
        return BatchResult(vectors[:-1] if (ids == SHORT).any() else vectors, times)


def run_fake() -> int:
    """``serve`` with this backend in the model's place."""
    run, checkpoint = app.run, fake_checkpoint()

    def run_it(config: object) -> int:
        return run(config, make_backend=lambda _: FaultServerBackend, checkpoint=checkpoint)  # type: ignore[arg-type]

    app.run = run_it  # type: ignore[assignment]
    return main(["serve", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(run_fake())

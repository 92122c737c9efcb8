"""One text of the engine's own, from the tokenizer to its vector.

Decides what such a text passes (everything that a caller's does) and what it moves (no policy, no figure, no trace).
Must never know why it is sent.
"""

from __future__ import annotations

import asyncio
import time

import numpy as np
import numpy.typing as npt

from embedserve.engine.call import Call, Embedded
from embedserve.engine.driver import Driver
from embedserve.engine.intake import Intake
from embedserve.engine.pending import Probe
from embedserve.engine.stages import Stages
from embedserve.engine.tokenization import TokenizerPool
from embedserve.errors import NotServing
from embedserve.model.tokenizer import Truncation

__all__ = ["send_probe"]


async def send_probe(text: str, pool: TokenizerPool, intake: Intake, driver: Driver) -> npt.NDArray[np.float32]:
    """The vector of ``text``, shape ``[dimension]``.

    Raises ``NotServing`` where it has no place in the queue, and what any text may raise. It leaves on cancellation.
    """
    call = Call(stages=Stages(time.monotonic_ns()), texts=(text,), truncation=Truncation.END)
    tokenized = await pool.probe(text)
    lengths = tokenized.lengths.tolist()
    intake.refuse_unusable(call, lengths)
    submission = intake.submission(call, lengths, intake.new_flow())._replace(probe=True)
    future: asyncio.Future[Embedded] = asyncio.get_running_loop().create_future()
    pending = Probe(submission, call, tokenized.ids, tokenized.truncated, 0, future)
    rejection = driver.submit(pending)
    if rejection is not None:
        raise NotServing("the queue has no place", reason=rejection.reason, retry_after_ms=rejection.retry_after_ms)
    try:
        embedded = await future
    except asyncio.CancelledError:
        driver.cancel(pending)
        raise
    vector: npt.NDArray[np.float32] = embedded.vectors[0]
    return vector

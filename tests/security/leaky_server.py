"""``embedserve serve`` whose parts fail with the caller's own words, as a library's exceptions may.

Signs in a text are orders: ``poison`` raises in the device's pass, ``cut`` in the tokenizer, ``broken`` when the answer
is encoded. Each exception, and each behind it, quotes the text.
"""

from __future__ import annotations

import sys
from typing import Any

from embedserve import app
from embedserve.api import embedding
from embedserve.cli import main
from embedserve.model.backend import BatchResult, TokenBatch
from embedserve.model.tokenizer import TextTokenizer
from embedserve.testing import FaultPlan, FaultyBackend, fake_checkpoint
from tests.integration.server.fake_server import _id

POISON = _id("poison")

LAST: list[str] = [""]
"""The text that was tokenised last: what an exception somewhere below may hold."""


def fail(kind: type[BaseException]) -> None:
    """Raise with the text in the exception, in its cause, in a note and in a local variable."""
    text = LAST[0]
    try:
        {}[text]
    except KeyError as cause:
        error = kind(f"cannot work on {text!r}", text)
        error.add_note(f"while at {text}")
        raise error from cause


class LeakyBackend(FaultyBackend):
    def embed(self, batch: TokenBatch) -> BatchResult:
        if (batch.ids == POISON).any():
            fail(ValueError)
        return super().embed(batch)


def patch() -> None:
    """Make tokenizer and encoder fail on demand."""
    tokenize, encode = TextTokenizer._encode, embedding.encode

    def leaky_tokenize(self: Any, texts: list[str]) -> Any:
        LAST[0] = texts[0]
        if "cut" in texts[0]:
            fail(RuntimeError)
        return tokenize(self, texts)

    def leaky_encode(*arguments: Any) -> Any:
        if "broken" in LAST[0]:
            fail(ValueError)
        return encode(*arguments)

    TextTokenizer._encode = leaky_tokenize  # type: ignore[method-assign]
    embedding.encode = leaky_encode


if __name__ == "__main__":
    patch()
    run, checkpoint = app.run, fake_checkpoint()

    def run_leaky(config: object) -> int:
        return run(config, make_backend=lambda _: lambda: LeakyBackend(FaultPlan()), checkpoint=checkpoint)  # type: ignore[arg-type]

    app.run = run_leaky  # type: ignore[assignment]
    sys.exit(main(["serve", *sys.argv[1:]]))

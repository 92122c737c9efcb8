"""The product's server on the null model: ``python -m loadtest.null_server CHECKPOINT [--slices] [settings]``.

Decides nothing: ``embedserve serve`` with another backend. Settings are given as to ``embedserve serve``;
``--device US:NS`` is a device whose pass takes so many microseconds and so many nanoseconds a token.
"""

from __future__ import annotations

import os
import sys

from embedserve.app import run
from embedserve.config import load_config
from loadtest import slices
from loadtest.nullmodel import null_backend


def main(arguments: list[str]) -> int:
    """Serve until SIGTERM."""
    checkpoint, *rest = arguments
    if "--slices" in rest:
        rest.remove("--slices")
        slices.install()
    batch_us = token_ns = 0
    if "--device" in rest:
        at = rest.index("--device")
        batch_us, token_ns = (int(part) for part in rest.pop(at + 1).split(":"))
        rest.pop(at)
    flags = {name.removeprefix("--"): value for name, value in zip(rest[::2], rest[1::2], strict=True)}
    loaded = load_config({"model.source": checkpoint, **flags}, dict(os.environ))
    return run(loaded.config, make_backend=null_backend(batch_us, token_ns))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

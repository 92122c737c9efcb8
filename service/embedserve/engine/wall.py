"""The wall around callbacks of the event loop.

Decides what an exception in one means: a promise of our own code does not hold, and the process must end. asyncio only
logs it and goes on, with everybody who waits for that callback's work waiting for ever. Must never know what a callback
does.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import ParamSpec

__all__ = ["sentence", "walled"]

_P = ParamSpec("_P")


def walled(step: Callable[_P, object], on_broken: Callable[[Exception], None]) -> Callable[_P, None]:
    """``step``, with every exception told to ``on_broken``."""

    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            step(*args, **kwargs)
        except Exception as broken:  # noqa: BLE001 - whatever it is, nobody else will ever hear of it
            on_broken(broken)

    return guarded


def sentence(broken: BaseException) -> str:
    """What broke and where, for the log."""
    frames = traceback.extract_tb(broken.__traceback__)
    where = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
    return f"{type(broken).__name__}: {broken}{where}"

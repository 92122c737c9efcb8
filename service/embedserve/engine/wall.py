"""Callbacks of the event loop: how threads hand them over, and the wall around them.

Decides what an exception in one means: a promise of our own code does not hold, and the process must end. asyncio only
logs it and goes on, with everybody who waits for that callback's work waiting for ever. Must never know what a callback
does.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["post", "sentence", "settle", "walled"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


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


def post(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *arguments: object) -> None:
    """Hand over to the loop from another thread; a loop that is closed has nobody left to tell."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(callback, *arguments)


def settle(future: asyncio.Future[_T], outcome: _T) -> None:
    """Give ``future`` its result, unless whoever waited has gone."""
    if not future.done():
        future.set_result(outcome)

"""How a call ends, as grpc.aio has it.

Decides nothing. Must never know why a call ends: ``guard`` does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc
import grpc.aio

from embedserve.api.rpc import Rpc
from embedserve.api.status import Reply

__all__ = ["TRACE_ID_KEY", "abort", "cancelled_from_outside", "status_name", "write_all"]

TRACE_ID_KEY: Final = "x-trace-id"


def cancelled_from_outside() -> bool:
    """Whether somebody cancelled this task, which only grpc can: the client or the deadline; not a future within it."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def status_name(code: Any) -> str:
    """The name of a status that a handler has set, as one of grpc's or as a number."""
    if isinstance(code, grpc.StatusCode):
        return code.name
    return next((known.name for known in grpc.StatusCode if known.value[0] == code), "UNKNOWN")


async def write_all(responses: AsyncIterator[Any], context: Any) -> None:
    """Send what an async generator gives, and close it whatever happens, so that its ``finally`` runs now."""
    try:
        async for response in responses:
            await context.write(response)
    finally:
        await responses.aclose()  # type: ignore[attr-defined]


async def abort(context: Any, reply: Reply, call: Rpc, *, within_s: float | None) -> None:
    """Send ``reply`` as the call's status; raises ``CancelledError`` if it was not taken in time."""
    trailers = reply.trailers
    if call.trace.trace_id is not None:  # trailers of an abort replace those that were set before
        trailers = (*trailers, (TRACE_ID_KEY, call.trace.trace_id))
    try:
        if within_s is None:
            await context.abort(reply.code, reply.message, trailers)
        else:
            async with asyncio.timeout(within_s):
                await context.abort(reply.code, reply.message, trailers)
    except grpc.aio.AbortError as sent:
        # Raised by grpc once the status is out, and kept with the call: with its traceback and the error that it
        # answers it would hold every frame of the call, which hold the call. Under overload the collector would live
        # on these cycles, some 60 objects a refusal. grpc raises it again when the handler has returned.
        sent.__traceback__ = sent.__context__ = None
    except TimeoutError as stalled:
        raise asyncio.CancelledError from stalled

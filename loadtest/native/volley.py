"""A plan sent by ``client.cpp``: one thread that holds no lock of Python's.

Decides how a plan and its rows cross into C++ and back, and when the library cannot be had. Must never know what a
request or an answer says. A call costs it a fifth of what ``wire_client.py`` needs (``loadtest/results/profile.md``).
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from embedserve.model.native.compiler import CannotCompile, compile_library, default_cache
from loadtest.answer import DEADLINE_EXCEEDED, OK, UNAVAILABLE, UNKNOWN, Answer
from loadtest.ending import GOOD, code_of_reset, read_ending
from loadtest.plan import Plan

__all__ = ["Ended", "Unavailable", "Volley", "load_library"]

SOURCE: Final = Path(__file__).with_name("client.cpp")
TRAILERS, RESET, LOST, GAVE_UP, NO_CONNECTION, NO_TRAILERS = range(6)
CODES: Final = {LOST: UNAVAILABLE, GAVE_UP: DEADLINE_EXCEEDED, NO_CONNECTION: UNAVAILABLE, NO_TRAILERS: UNKNOWN}

ROW = np.dtype(
    [
        ("meant", "f8"), ("sent", "f8"), ("first", "f8"), ("ended", "f8"), ("blob_at", "u8"),
        ("head_size", "u4"), ("tail_size", "u4"), ("body_size", "u4"), ("request", "u4"), ("value", "u4"),
        ("phase", "u2"), ("ending", "u2"),
    ],
    align=True,
)  # fmt: skip


class Unavailable(Exception):
    """There is no such client here; the sentence says why."""


class _Crowd(ctypes.Structure):
    _fields_ = (
        ("begins", ctypes.c_double),
        ("ends", ctypes.c_double),
        ("callers", ctypes.c_uint32),
        ("phase", ctypes.c_uint32),
    )


class _Plan(ctypes.Structure):
    _fields_ = (
        ("host", ctypes.c_char_p),
        ("port", ctypes.c_char_p),
        ("head", ctypes.c_char_p),
        ("requests", ctypes.POINTER(ctypes.c_char_p)),
        ("sizes", ctypes.POINTER(ctypes.c_uint32)),
        ("arrivals", ctypes.c_void_p),
        ("phases", ctypes.c_void_p),
        ("crowds", ctypes.POINTER(_Crowd)),
        ("turn", ctypes.c_uint64),
        ("step", ctypes.c_uint64),
        ("arrival_count", ctypes.c_uint64),
        ("start", ctypes.c_double),
        ("ends", ctypes.c_double),
        ("give_up_s", ctypes.c_double),
        ("head_size", ctypes.c_uint32),
        ("request_count", ctypes.c_uint32),
        ("crowd_count", ctypes.c_uint32),
        ("connections", ctypes.c_uint32),
        ("in_flight_max", ctypes.c_uint32),
        ("keep", ctypes.c_uint32),
    )


class _Progress(ctypes.Structure):
    _fields_ = (
        ("ended", ctypes.c_uint64),
        ("failed", ctypes.c_uint64),
        ("unsent", ctypes.c_uint64),
        ("kept_bytes", ctypes.c_uint64),
    )


def load_library() -> ctypes.CDLL:
    """The client, built when it is not there yet (two seconds). Raises ``Unavailable``."""
    try:
        library = ctypes.CDLL(str(compile_library(SOURCE, default_cache(), with_torch=False).path))
    except (CannotCompile, OSError) as error:
        raise Unavailable(str(error)) from error
    library.volley_make.argtypes, library.volley_make.restype = [ctypes.POINTER(_Plan)], ctypes.c_void_p
    for name in ("volley_run", "volley_stop", "volley_free"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
    library.volley_run.restype = ctypes.c_int
    library.volley_progress.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Progress)]
    library.volley_take.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_void_p)]
    library.volley_take.restype = ctypes.c_uint64
    return library


@dataclass(frozen=True, slots=True)
class Ended:
    """One call; instants are the plan's."""

    meant: float
    sent: float
    ended: float
    request: int
    """Place in ``Plan.calls``."""
    phase: int
    answer: Answer
    """``first_at`` is an instant of the plan; 0 without a message."""
    connected: bool
    """Whether there was a connection to send it on."""


class Volley:
    """One plan on its way. ``run`` blocks one thread; everything else is for one other."""

    def __init__(
        self,
        library: ctypes.CDLL,
        address: str,
        head: bytes,
        requests: Sequence[bytes],
        plan: Plan,
        *,
        connections: int,
        give_up_s: float | None,
        keep: bool,
    ) -> None:
        """``requests`` are the serialised messages of ``plan.calls``; ``head`` is the header block of each call."""
        host, _, port = address.rpartition(":")
        framed = [b"\x00" + len(message).to_bytes(4, "big") + message for message in requests]
        arrivals = np.ascontiguousarray(plan.arrivals, dtype=np.float64)
        phases = np.ascontiguousarray(plan.phases, dtype=np.uint16)
        crowds = (_Crowd * len(plan.crowds))(*((c.begins, c.ends, c.callers, c.phase) for c in plan.crowds))
        given = _Plan(
            host=host.strip("[]").encode(),
            port=port.encode(),
            head=head,
            requests=(ctypes.c_char_p * len(framed))(*framed),
            sizes=(ctypes.c_uint32 * len(framed))(*map(len, framed)),
            arrivals=arrivals.ctypes.data,
            phases=phases.ctypes.data,
            crowds=crowds,
            turn=plan.turn,
            step=plan.step,
            arrival_count=len(arrivals),
            start=plan.start,
            ends=plan.ends,
            give_up_s=give_up_s or 0.0,
            head_size=len(head),
            request_count=len(framed),
            crowd_count=len(plan.crowds),
            connections=connections,
            in_flight_max=plan.in_flight_max,
            keep=keep,
        )
        # The library reads all of this as long as it runs.
        self._held = (given, framed, arrivals, phases, crowds)
        self._library = library
        self._volley: Any = library.volley_make(given)
        self._used = threading.Lock()

    def run(self) -> None:
        """Send it all. Raises ``ConnectionError`` when the host's name is not known or the system gives no more."""
        with self._used:
            error = self._library.volley_run(self._volley)
        if error:
            raise ConnectionError(f"the load generator stopped: {os.strerror(error)}")

    def stop(self) -> None:
        """Let ``run`` end soon; calls that are open end as DEADLINE_EXCEEDED."""
        if self._volley is not None:
            self._library.volley_stop(self._volley)

    def progress(self) -> tuple[int, int, int, int]:
        """Calls that have ended, of them failed, calls not sent, and bytes that wait to be taken."""
        found = _Progress()
        self._library.volley_progress(self._volley, found)
        return found.ended, found.failed, found.unsent, found.kept_bytes

    def take(self) -> Iterator[Ended]:
        """The calls that have ended since the last time. Read it to its end before it is asked again."""
        rows, blobs = ctypes.c_void_p(), ctypes.c_void_p()
        count = self._library.volley_take(self._volley, rows, blobs)
        if not count:
            return
        table = np.frombuffer(ctypes.string_at(rows, count * ROW.itemsize), dtype=ROW)
        base = blobs.value or 0
        for row in table.tolist():
            meant, sent, first, ended, at, head_size, tail_size, body_size, request, value, phase, ending = row
            head = ctypes.string_at(base + at, head_size) if head_size else b""
            tail = ctypes.string_at(base + at + head_size, tail_size)
            answer = Answer()
            if ending == TRAILERS:
                if tail == GOOD:  # all that is kept of the trailers of a good answer
                    answer.code = OK
                else:
                    read_ending(answer, tail, head)
            else:
                answer.code = code_of_reset(value) if ending == RESET else CODES[ending]
            if body_size:
                answer.parts.append(ctypes.string_at(base + at + head_size + tail_size, body_size))
            answer.first_at = first
            yield Ended(meant, sent, ended, request, phase, answer, ending != NO_CONNECTION)

    def close(self) -> None:
        """End it, and give its memory back."""
        self.stop()
        with self._used:
            if self._volley is not None:
                self._library.volley_free(self._volley)
                self._volley = None

"""The compiled pass is made beside a server that already serves, and takes over between two passes.

Decides the order: build or find the library, lay out the weights, compare with the model that runs, and only then offer
it. Every failure leaves the model that runs. Must never know batches or events of a server.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from embedserve.model.native.compiler import CannotCompile, compile_library
from embedserve.model.native.library import NativeEncoder, Plan

__all__ = ["SOURCE", "Compilation", "CompilationEnd"]

SOURCE = Path(__file__).with_name("encoder.cpp")
Judge = Callable[[NativeEncoder], None]
"""Raises ``CannotCompile`` where the compiled pass gives other vectors than the model that runs."""


@dataclass(frozen=True, slots=True)
class CompilationEnd:
    """How it went."""

    encoder: NativeEncoder | None
    """``None`` where it failed."""
    seconds: float
    """From the begin until it could be judged: what a start without a cache has to wait for."""
    cached: bool
    why: str = ""
    """The reason of a failure, in a sentence."""


class Compilation:
    """One attempt, in a thread of its own. Made and asked by one thread."""

    def __init__(self, make_plan: Callable[[], Plan], *, cache: Path, lanes: int, nice: int = 0) -> None:
        """Begin. ``make_plan`` is called in the other thread; it raises ``CannotCompile`` where there is no plan."""
        self._make_plan = make_plan
        self._cache = cache
        self._lanes, self._nice = lanes, nice
        self._begun = time.monotonic()
        self._made = threading.Event()
        self._judge: Judge | None = None
        self._judge_there = threading.Event()
        self._end: CompilationEnd | None = None
        self._ended = threading.Event()
        # Daemon: the end of the process waits for no compiler.
        threading.Thread(target=self._work, name="embedserve-compile", daemon=True).start()

    @property
    def is_made(self) -> bool:
        """Whether the library is loaded and only the comparison is left, or it has failed."""
        return self._made.is_set()

    def judge_with(self, judge: Judge) -> None:
        """What the compiled pass must stand up to before it is offered; called once, in the other thread."""
        self._judge = judge
        self._judge_there.set()

    def end(self, timeout_s: float = 0.0) -> CompilationEnd | None:
        """How it went, or ``None`` while it goes on."""
        return self._end if self._ended.wait(timeout_s) else None

    def _work(self) -> None:
        cached = False
        try:
            with torch.inference_mode():
                plan = self._make_plan()
                library = compile_library(SOURCE, self._cache)
                try:
                    encoder = NativeEncoder(library.path, plan, self._lanes, self._nice)
                except CannotCompile:
                    if not library.cached:
                        raise
                    library = compile_library(SOURCE, self._cache, anew=True)
                    encoder = NativeEncoder(library.path, plan, self._lanes, self._nice)
                cached = library.cached
                seconds = time.monotonic() - self._begun
                self._made.set()
                self._judge_there.wait()
                assert self._judge is not None
                self._judge(encoder)
            self._end = CompilationEnd(encoder, seconds, cached)
        except (CannotCompile, RuntimeError) as error:
            self._end = CompilationEnd(None, time.monotonic() - self._begun, cached, str(error))
        except BaseException as error:
            self._end = CompilationEnd(None, time.monotonic() - self._begun, cached, f"{type(error).__name__}: {error}")
            raise
        finally:
            self._made.set()
            self._ended.set()

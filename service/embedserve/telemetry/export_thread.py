"""The thread that sends what waits: one for spans, one for log lines.

Decides when it is woken, and how it ends. Must never know what it sends, nor where that waits.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping

from embedserve.errors import ConfigError

__all__ = ["ExportThread", "whole_numbers"]


class ExportThread:
    """Calls ``send_waiting`` when something waits and has had company for long enough."""

    def __init__(self, name: str, delay_s: float, send_waiting: Callable[[], None]) -> None:
        """Nothing runs before ``start``. ``delay_s`` is how long what waits is left to wait for more."""
        self._name = name
        self._delay_s = delay_s
        self._send_waiting = send_waiting
        self._filled = threading.Event()
        self._pressing = threading.Event()
        self.closing = False
        """Whether the last of it is being sent."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to wait."""
        self._thread.start()

    @property
    def is_current(self) -> bool:
        """Whether this thread is the one that asks."""
        return threading.current_thread() is self._thread

    @property
    def is_pressed(self) -> bool:
        """Whether it will send at once."""
        return self._pressing.is_set()

    def wake(self) -> None:
        """Something waits."""
        self._filled.set()

    def press(self) -> None:
        """So much waits that it goes out now."""
        self._pressing.set()

    def close(self, timeout_s: float, shut_down: Callable[[], object]) -> bool:
        """Send what waits and stop, within ``timeout_s``; whether all was sent. ``shut_down`` is called in any case."""
        ends = time.monotonic() + timeout_s
        self.closing = True
        self._pressing.set()
        self._filled.set()
        self._thread.join(timeout_s)
        sent = not self._thread.is_alive()
        # Shutting an exporter down wakes an export that waits for a dead collector; it may wait itself.
        stopper = threading.Thread(target=shut_down, name=f"{self._name}-stop", daemon=True)
        stopper.start()
        stopper.join(max(0.0, ends - time.monotonic()))
        return sent

    def _run(self) -> None:
        while not self.closing:
            self._filled.wait()
            self._pressing.wait(self._delay_s)
            self._filled.clear()
            self._pressing.clear()
            self._send_waiting()
        self._send_waiting()


def whole_numbers(defaults: Mapping[str, int]) -> list[int]:
    """What the variables of the environment that ``defaults`` names say, in its order.

    Raises ``ConfigError`` with every one of them that is not a positive whole number.
    """
    given = {name: os.environ.get(name) or str(default) for name, default in defaults.items()}
    wrong = {name: text for name, text in given.items() if not (text.isdecimal() and int(text) > 0)}
    if wrong:
        raise ConfigError([f"{name} = {text}: must be a positive whole number" for name, text in wrong.items()])
    return [int(text) for text in given.values()]

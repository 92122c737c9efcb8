"""``embedserve serve`` that tells how many tasks its event loop has: ``python -m loadtest.soak_server [settings]``.

Decides nothing: on SIGUSR1 one JSON line on standard output. Settings are given as to ``embedserve serve``.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys

from embedserve import app
from embedserve.config import load_config


class TellingApp(app.App):
    """The composition root with one more signal."""

    def handle_signals(self) -> None:
        """SIGUSR1 beside the others."""
        super().handle_signals()
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self._tell)

    def _tell(self) -> None:
        assert self.engine is not None
        assert self.guard is not None
        depth = self.engine.scheduler.depth
        facts = {
            "tasks": len(asyncio.all_tasks()),
            "calls": self.guard.in_flight,
            "requests": self.engine.requests,
            "waiting_items": depth.waiting_items,
            "waiting_tokens": depth.waiting_tokens,
            "running_items": depth.running_items,
        }
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()


def main(arguments: list[str]) -> int:
    """Serve until SIGTERM."""
    flags = {name.removeprefix("--"): value for name, value in zip(arguments[::2], arguments[1::2], strict=True)}
    app.App = TellingApp  # type: ignore[misc]
    return app.run(load_config(flags, dict(os.environ)).config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

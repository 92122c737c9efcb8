"""``embedserve serve`` around a model whose passes take ``PASS_MS`` each, however much is in them: a known capacity.

Unlike the signs of ``fake_server`` the time is measured by the pass itself, so that admission learns it.
"""

from __future__ import annotations

import os
import sys

from embedserve import app
from embedserve.cli import main
from embedserve.testing import FakeBackend, fake_checkpoint
from tests.integration.server.process import LOOPBACK

PACED = ("-m", "tests.integration.clients.paced_server", *LOOPBACK)

if __name__ == "__main__":
    run, checkpoint = app.run, fake_checkpoint()
    pass_ns = int(os.environ["PASS_MS"]) * 1_000_000

    def run_paced(config: object) -> int:
        backend = FakeBackend(pass_ns=lambda _batch: pass_ns)
        return run(config, make_backend=lambda _: lambda: backend, checkpoint=checkpoint)  # type: ignore[arg-type]

    app.run = run_paced  # type: ignore[assignment]
    sys.exit(main(["serve", *sys.argv[1:]]))

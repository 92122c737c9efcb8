"""What a process that is started for a measurement gets of the caller's environment."""

from __future__ import annotations

import sys

import pytest

from loadtest import server
from loadtest.environment import without_foreign


class TestEnvironment:
    def test_what_would_change_a_figure_stays_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("OTEL_SDK_DISABLED", "EMBEDSERVE_MODEL_DTYPE", "GRPC_POLL_STRATEGY", "PEER_CACHE", "KEPT"):
            monkeypatch.setenv(name, "foreign")
        assert [name for name, value in without_foreign("PEER_").items() if value == "foreign"] == ["KEPT"]

    def test_a_server_gets_what_the_measurement_gives_and_nothing_of_the_caller_s(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nor gRPC's variables, which change a server as they change a client."""
        for name in ("OTEL_A", "EMBEDSERVE_A", "GRPC_A"):
            monkeypatch.setenv(name, "foreign")
        told = "import json, os; print(json.dumps({'address': '', **os.environ}))"
        with server._started([sys.executable, "-c", told], {"GRPC_B": "given"}) as found:
            assert "foreign" not in found.ready.values()
            assert found.ready["GRPC_B"] == "given"

"""Turns become medians, ranges and ratios; vectors are judged before anything is timed; a frozen peer stands still."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtest.drive import TargetFailed
from loadtest.peers import compare, parity
from loadtest.peers import process as peer_process
from loadtest.peers.__main__ import PEERS, SCENARIOS, _peer, _scenario
from loadtest.peers.coral import Coral
from loadtest.peers.peer import HOST, Launch, Peer, Vectors
from loadtest.peers.process import running
from loadtest.scenario import load_scenario


def turn_of(rate: float, **given: Any) -> dict[str, Any]:
    return {
        "texts_per_s": rate, "calls_per_s": rate, "failed_share": 0.0, "statuses": {"OK": 10}, "p50_ms": 1.0,
        "p95_ms": 2.0, "p99_ms": 3.0, "server_cores": 1.5, "client_cores": 0.1,
        "server_cpu_ms_per_text": 1.5, "rss_mib": 500.0, "notes": [], **given,
    }  # fmt: skip


class TestSummary:
    def test_the_ratio_is_taken_within_each_repetition(self) -> None:
        """A machine that is half as fast in one repetition changes both, and the ratio not at all."""
        turns = {"embedserve": [turn_of(1000), turn_of(500)], "coral": [turn_of(100), turn_of(50)]}

        ratio = compare.summary(turns, "short")["peers"]["coral"]["embedserve_is_times"]

        assert ratio == {"median": 10.0, "lowest": 10.0, "highest": 10.0}

    def test_medians_and_ranges(self) -> None:
        turns = {"embedserve": [turn_of(9), turn_of(10), turn_of(14)], "coral": [turn_of(1), turn_of(2), turn_of(4)]}

        peers = compare.summary(turns, "mixed")["peers"]

        assert peers["embedserve"]["texts_per_s"] == {"median": 10, "lowest": 9, "highest": 14}
        assert "embedserve_is_times" not in peers["embedserve"]
        assert peers["coral"]["embedserve_is_times"] == {"median": 5.0, "lowest": 3.5, "highest": 9.0}
        assert peers["coral"]["statuses"] == {"OK": 30}

    @pytest.mark.parametrize(("rate", "met"), [(100.0, True), (101.0, False)])
    def test_a_mark_is_met_by_the_median(self, rate: float, met: bool) -> None:
        turns = {"embedserve": [turn_of(1000.0)], "infinity": [turn_of(rate)], "infinity:bfloat16": [turn_of(rate)]}

        peers = compare.summary(turns, "short")["peers"]

        assert (peers["infinity"]["mark"], peers["infinity"]["met"]) == (10, met)
        assert "mark" not in peers["infinity:bfloat16"]

    def test_a_turn_that_failed_is_kept_and_not_counted(self) -> None:
        turns = {"embedserve": [turn_of(10), turn_of(20)], "coral": [turn_of(5), {"failed": "it went away"}]}

        peers = compare.summary(turns, "short")["peers"]

        assert peers["coral"]["failed_turns"] == ["it went away"]
        assert peers["coral"]["embedserve_is_times"]["median"] == 2.0

    def test_a_peer_that_always_failed_has_no_figures(self) -> None:
        found = compare.summary({"embedserve": [turn_of(10)], "coral": [{"failed": "no answer"}]}, "short")

        assert "texts_per_s" not in found["peers"]["coral"]
        assert "coral" in compare.table(found)
        assert "failed: no answer" in compare.table(found)


class FakeServer:
    """A running peer that writes down what is done with it."""

    address = "127.0.0.1:1"
    model = Path("/a/model")

    def __init__(self, peer: Peer, log: list[str]) -> None:
        self.peer = peer
        self._log = log

    def _note(self, what: str) -> None:
        self._log.append(f"{self.peer.label} {what}")

    def thaw(self) -> None:
        self._note("thaw")

    def freeze(self) -> None:
        self._note("freeze")

    def settle(self, _window_s: float) -> bool:
        self._note("settle")
        return True


class TestTurns:
    @pytest.fixture
    def log(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Every run fails, as that of a peer that went away does."""
        log: list[str] = []

        async def drive(_scenario: Any, make_target: Any, **_options: Any) -> Any:
            log.append(f"drive {make_target.func.__self__.label}")
            raise TargetFailed("it went away")

        monkeypatch.setattr(compare, "drive", drive)
        return log

    def servers(self, log: list[str]) -> Any:
        return [FakeServer(PEERS[name](), log) for name in ("embedserve", "coral", "infinity")]

    def test_peers_take_turns_in_each_repetition(self, log: list[str]) -> None:
        said: list[str] = []

        turns = compare.compared(self.servers(log), load_scenario("short"), 2, said.append)

        assert [line for line in log if line.startswith("drive")] == 2 * [
            "drive embedserve",
            "drive coral",
            "drive infinity",
        ]
        assert turns["coral"] == 2 * [{"failed": "it went away"}]
        assert "short 2/2 infinity: it went away" in said[-1]

    def test_one_that_fails_is_idle_and_frozen_before_the_next_begins(self, log: list[str]) -> None:
        compare.compared(self.servers(log), load_scenario("short"), 1, lambda _: None)

        assert log[:5] == [
            "embedserve thaw",
            "drive embedserve",
            "embedserve settle",
            "embedserve freeze",
            "coral thaw",
        ]


class TestTable:
    def test_each_peer_has_its_line_with_ratio_and_mark(self) -> None:
        turns = {
            "embedserve": [turn_of(1000)],
            "coral": [turn_of(100, failed_share=0.25, notes=["few calls"])],
            "sentence-transformers": [turn_of(10, offline_texts_per_s=777.0, offline_batch_size=32)],
        }

        lines = compare.table(compare.summary(turns, "short")).splitlines()

        (coral,) = [line for line in lines if line.startswith("coral")]
        assert "100 (100-100)" in coral
        assert "25.0%" in coral
        assert "10.00 (10.00-10.00) x, mark 5 x met" in coral
        assert any("777" in line and "offline" in line for line in lines)
        assert "  coral: few calls" in lines


class TestParity:
    texts = ("one", "two", "three")

    def test_the_worst_text_decides(self) -> None:
        ours = np.eye(3, dtype=np.float32)
        given = ours.copy()
        given[1] = (0.0, 0.9, 0.436)

        verdict = parity.check(PEERS["infinity"](), given, ours, self.texts, Path())

        assert verdict.cosine_min == pytest.approx(0.9, abs=1e-3)
        assert not verdict.met
        assert "WRONG" in verdict.line()

    def test_a_peer_that_pools_otherwise_is_judged_by_its_own_reference(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given = np.array([[1, 0], [0, 1], [1, 1]], dtype=np.float32)
        ours = np.array([[1, 1], [0, 1], [1, 1]], dtype=np.float32)
        monkeypatch.setattr(Coral, "expected", lambda *_: given * 2)

        verdict = parity.check(Coral(), given, ours, self.texts, Path())

        assert verdict.met
        assert verdict.cosine_min == 1.0
        assert verdict.embedserve_min == pytest.approx(2**-0.5, abs=1e-6)
        assert verdict.to_json()["met"] is True

    def test_random_layers_are_nonsense(self) -> None:
        rng = np.random.default_rng(17)
        given, ours = (rng.standard_normal((3, 384)).astype(np.float32) for _ in range(2))
        assert not parity.check(PEERS["infinity"](), given, ours, self.texts, Path()).met

    def test_a_zero_vector_is_not_right_and_not_nan(self) -> None:
        ours = np.ones((1, 4), dtype=np.float32)
        assert parity.cosines(np.zeros((1, 4), dtype=np.float32), ours).tolist() == [0.0]

    def test_other_shapes_cannot_be_compared(self) -> None:
        with pytest.raises(ValueError, match="cannot be compared"):
            parity.cosines(np.ones((2, 3), dtype=np.float32), np.ones((2, 4), dtype=np.float32))


class TestCommand:
    def test_what_is_compared_by_default_is_there_and_can_be(self) -> None:
        options: Any = type("Options", (), {"seconds": 3.0})()
        for name in SCENARIOS:
            scenario = _scenario(name, options)
            assert (scenario.seconds, scenario.phases[0].closed) == (3.0, True)

    def test_an_open_loop_cannot_be_compared(self) -> None:
        options: Any = type("Options", (), {"seconds": 3.0})()
        with pytest.raises(ValueError, match="cannot be compared"):
            _scenario("overload", options)

    def test_a_peer_is_named_with_its_variant(self) -> None:
        assert _peer("infinity:bfloat16").label == "infinity:bfloat16"
        with pytest.raises(ValueError, match="there is no peer 'tei'; there are embedserve, coral"):
            _peer("tei")

    def test_every_mark_names_a_peer_and_a_scenario_that_there_are(self) -> None:
        for name, marks in compare.MARKS.items():
            assert name in PEERS
            for scenario in marks:
                load_scenario(scenario)


SERVER = """
import socket, sys, threading, time
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
def burn():
    while True:
        sum(range(1000))
if sys.argv[2] == "busy":
    threading.Thread(target=burn, daemon=True).start()
print("listening", flush=True)
while True:
    connection, _ = listener.accept()
    connection.sendall(b"!")
    connection.close()
"""


class ScriptTarget:
    def __init__(self, address: str) -> None:
        self.address = address

    async def open(self) -> None:
        host, _, port = self.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            if connection.recv(1) != b"!":
                raise ConnectionError("no answer")

    async def embed(self, texts: Sequence[str], *, timeout_s: float) -> Any:
        raise NotImplementedError

    async def vectors(self, texts: Sequence[str]) -> Vectors:
        return np.ones((len(texts), 2), dtype=np.float32)

    async def close(self) -> None:
        pass


class ScriptPeer(Peer):
    """A process that listens and does nothing, or nothing useful."""

    name = "script"
    about = "a process of the test"
    variants = ("idle", "busy", "broken")

    def launch(self, python: Path, model: Path, port: int) -> Launch:
        script = "import sys; sys.exit('it does not start')" if self.variant == "broken" else SERVER
        return Launch([str(python), "-c", script, str(port), self.variant])

    def target(self, address: str, model: Path) -> Any:
        return ScriptTarget(address)


@pytest.mark.process
class TestProcess:
    def test_a_frozen_peer_uses_no_cpu_and_a_thawed_one_goes_on(self, tmp_path: Path) -> None:
        with running(ScriptPeer("busy"), Path(sys.executable), tmp_path, tmp_path) as server:
            assert server.alive()
            assert server.rss_mib() > 1

            def used(seconds: float, at_least: float = 0.0) -> float:
                before, ends = server.cpu_s(), time.monotonic() + 10
                time.sleep(seconds)
                while server.cpu_s() - before < at_least and time.monotonic() < ends:
                    time.sleep(0.02)
                return server.cpu_s() - before

            assert used(0.0, at_least=0.05) > 0
            server.freeze()
            time.sleep(0.05)  # a signal takes effect when each thread next leaves the kernel
            assert used(0.15) == 0
            server.thaw()
            assert used(0.0, at_least=0.05) > 0

    def test_it_ends_with_the_block_even_when_frozen(self, tmp_path: Path) -> None:
        with running(ScriptPeer(), Path(sys.executable), tmp_path, tmp_path) as server:
            server.freeze()
        assert not server.alive()

    def test_an_idle_one_settles_and_a_busy_one_does_not(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(peer_process, "SETTLE_WINDOW_S", 0.2)
        monkeypatch.setattr(peer_process, "SETTLE_S_MAX", 0.3)
        with running(ScriptPeer(), Path(sys.executable), tmp_path, tmp_path) as server:
            assert server.settle()
        with running(ScriptPeer("busy"), Path(sys.executable), tmp_path, tmp_path) as server:
            assert not server.settle()

    def test_one_that_does_not_start_says_why(self, tmp_path: Path) -> None:
        with (
            pytest.raises(RuntimeError, match=r"(?s)script:broken ended while it started.*it does not start"),
            running(ScriptPeer("broken"), Path(sys.executable), tmp_path, tmp_path),
        ):
            pass

    def test_variables_that_would_change_a_server_are_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("OTEL_SDK_DISABLED", "EMBEDSERVE_MODEL__DTYPE", "METRICS_ENABLED", "INFINITY_BATCH_SIZE"):
            monkeypatch.setenv(name, "foreign")
        found = peer_process._environment(Launch(["x"], {"METRICS_ENABLED": "false"}))
        assert "foreign" not in found.values()
        assert found["METRICS_ENABLED"] == "false"

    def test_peers_listen_for_this_machine_only(self) -> None:
        assert HOST == "127.0.0.1"

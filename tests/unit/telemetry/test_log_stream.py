"""A line is written whole or dropped and counted; nobody waits for a log."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import select
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
import structlog

from embedserve.telemetry import logs
from embedserve.telemetry.log_stream import HELD_BYTES_MAX, PATIENCE_MS, UNMADE_BYTES, LogStream
from embedserve.telemetry.logs import configure_logs

LINE = b"x" * 99 + b"\n"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    os.close(reading)
    os.close(writing)


@pytest.fixture
def log_set_up() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    structlog.reset_defaults()


def drain(reading: int) -> bytes:
    os.set_blocking(reading, False)
    got = b""
    try:
        while piece := os.read(reading, 1 << 20):
            got += piece
    except BlockingIOError:
        pass
    return got


class TestFullPipe:
    """A reader that has stopped reading."""

    def test_writing_goes_on_at_once_and_what_did_not_fit_is_counted(self, pipe: tuple[int, int]) -> None:
        told: list[int] = []
        stream = LogStream(pipe[1], told.append)
        begun = time.monotonic()
        for _ in range(5000):
            stream.write(LINE)
        took = time.monotonic() - begun
        held = drain(pipe[0])
        dropped = stream.dropped_lines
        stream.write(LINE)

        assert took < 1, "patience is bounded by a share of time, not by lines"
        assert took > PATIENCE_MS / 2000, "and there is some"
        assert held == LINE * (len(held) // len(LINE))
        assert dropped == 5000 - len(held) // len(LINE)
        assert told == [dropped]
        assert drain(pipe[0]) == LINE
        assert stream.dropped_lines == 0

    def test_a_long_line_that_breaks_off_does_not_swallow_the_next(self, pipe: tuple[int, int]) -> None:
        stream = LogStream(pipe[1])
        stream.write(b"a" * 200_000 + b"\n")
        first = drain(pipe[0])
        stream.write(b"next\n")

        assert first == b"a" * len(first)
        assert 0 < len(first) < 200_000
        assert drain(pipe[0]) == b"\nnext\n"

    def test_a_reader_that_is_only_slow_loses_nothing(self, pipe: tuple[int, int]) -> None:
        stream = LogStream(pipe[1])
        got = bytearray()

        def read() -> None:
            while not got.endswith(b"end\n"):
                got.extend(os.read(pipe[0], 1000))
                time.sleep(0.0005)

        reader = threading.Thread(target=read)
        reader.start()
        for _ in range(20):
            for _ in range(30):
                stream.write(LINE)
            time.sleep(0.01)
        stream.write(b"end\n")
        reader.join(10)

        assert bytes(got) == LINE * 600 + b"end\n"

    def test_threads_do_not_mix_their_lines(self, pipe: tuple[int, int]) -> None:
        stream = LogStream(pipe[1])
        threads = [
            threading.Thread(target=lambda c=c: [stream.write(bytes([c]) * 50 + b"\n") for _ in range(200)])
            for c in b"abcd"
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        lines = drain(pipe[0]).splitlines()
        assert len(lines) == 800
        assert all(len(set(line)) == 1 and len(line) == 50 for line in lines)


class TestBrokenTargets:
    """A disk that is full, a reader that has gone, no standard error at all."""

    def test_a_full_disk_drops_lines_and_raises_nothing(self) -> None:
        with Path("/dev/full").open("wb") as full:
            stream = LogStream(full.fileno())
            stream.write(LINE)

        assert stream.dropped_lines == 1

    def test_a_reader_that_has_gone(self) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        stream = LogStream(writing)
        stream.write(LINE)
        os.close(writing)

        assert stream.dropped_lines == 1

    def test_no_descriptor(self) -> None:
        stream = LogStream(None)

        assert stream.write(LINE) == len(LINE)
        assert stream.dropped_lines == 0


@pytest.mark.usefixtures("log_set_up")
class TestLogs:
    """Both ways of logging go through it, and the loss is told in the log itself."""

    def test_the_loss_is_a_line_once_lines_pass_again(self, pipe: tuple[int, int]) -> None:
        with io.TextIOWrapper(os.fdopen(os.dup(pipe[1]), "wb")) as text:
            configure_logs(level="info", levels={}, form="json", stream=text)
            log, old = structlog.get_logger("ours"), logging.getLogger("foreign")
            for number in range(2000):
                log.info("event", number=number)
                old.warning("foreign event %d", number)
            read = drain(pipe[0])
            log.info("again")
            rest = drain(pipe[0])

        lines = [orjson.loads(line) for line in (read + rest).splitlines()]
        kept = {line["number"] for line in lines if line["event"] == "event"}
        (lost,) = [line for line in lines if line["event"] == "log_lines_dropped"]
        assert kept == set(range(len(kept)))
        assert lost["lines"] + sum("event" in line["event"] for line in lines) == 4000
        assert (lost["level"], lost["logger"]) == ("warning", "embedserve.log")

    def test_without_standard_error_logging_is_silent(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Neither an error, nor a line on the next best descriptor: standard output is the ready line's."""
        monkeypatch.setattr("sys.stderr", None)
        stream = configure_logs(level="info", levels={}, form="auto")
        structlog.get_logger("ours").info("event")
        logging.getLogger("foreign").warning("event")
        assert stream is not None
        assert (stream.lines_written, stream.lines_dropped) == (0, 0)
        assert capfd.readouterr() == ("", "")


class TestHeldLines:
    """Lines of which there is one a call go out together."""

    def test_they_wait_for_a_flush_and_keep_their_order(self, pipe: tuple[int, int]) -> None:
        stream = LogStream(pipe[1])
        assert [stream.hold(b"%d\n" % number) for number in range(3)] == [True, False, False]
        assert drain(pipe[0]) == b""
        stream.flush()
        assert drain(pipe[0]) == b"0\n1\n2\n"
        assert stream.hold(b"3\n"), "the first since the flush"

    def test_a_line_that_cannot_wait_takes_them_along_before_it(self, pipe: tuple[int, int]) -> None:
        stream = LogStream(pipe[1])
        stream.hold(b"held\n")
        stream.write(b"at once\n")
        assert drain(pipe[0]) == b"held\nat once\n"
        assert stream.lines_written == 2

    def test_a_line_may_be_made_when_it_goes_out(self, pipe: tuple[int, int]) -> None:
        stream, made = LogStream(pipe[1]), []

        def make() -> bytes:
            made.append(1)
            return b"late\n"

        stream.hold(b"held\n")
        stream.hold(make)
        assert not made
        stream.write(b"at once\n")
        stream.flush()
        assert drain(pipe[0]) == b"held\nlate\nat once\n"
        assert (made, stream.lines_written) == ([1], 3)

    def test_lines_that_are_not_made_yet_have_a_limit_too(self, pipe: tuple[int, int]) -> None:
        stream = LogStream(pipe[1])
        for _ in range(HELD_BYTES_MAX // UNMADE_BYTES):
            stream.hold(lambda: b"late\n")
        assert drain(pipe[0]) == b"late\n" * (HELD_BYTES_MAX // UNMADE_BYTES)

    def test_what_is_held_has_a_limit(self, pipe: tuple[int, int]) -> None:
        stream = LogStream(pipe[1])
        for _ in range(HELD_BYTES_MAX // len(LINE) + 1):
            stream.hold(LINE)
        assert len(drain(pipe[0])) >= HELD_BYTES_MAX - select.PIPE_BUF

    def test_each_that_finds_no_room_is_counted_and_none_is_torn(self, pipe: tuple[int, int]) -> None:
        told: list[int] = []
        stream = LogStream(pipe[1], told.append)
        for _ in range(3000):
            stream.hold(LINE)
        stream.flush()
        there = drain(pipe[0])
        stream.write(LINE)

        assert there == LINE * (len(there) // len(LINE))
        assert told == [3000 - len(there) // len(LINE)]
        assert stream.lines_dropped == told[0]
        assert stream.lines_written == 3001 - told[0]

    async def test_access_lines_come_within_a_moment_of_the_event_loop(
        self, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(logs, "HOLD_S", 0.0)
        logger = logs.LineLogger(LogStream(pipe[1]), "access", logging.INFO)
        logger.info("rpc", status="OK")
        assert drain(pipe[0]) == b""
        await asyncio.sleep(0.001)
        assert orjson.loads(drain(pipe[0]))["status"] == "OK"

    def test_without_an_event_loop_they_come_at_once(self, pipe: tuple[int, int]) -> None:
        logs.LineLogger(LogStream(pipe[1]), "access", logging.INFO).info("rpc", status="OK")
        assert orjson.loads(drain(pipe[0]))["status"] == "OK"

"""More of everything than a client should send: each flood costs a little, harms nobody beside it, and leaves nothing.

RST (CVE-2023-44487), CONTINUATION (CVE-2024-27316), SETTINGS (CVE-2019-9515), PING (CVE-2019-9512), empty DATA
(CVE-2019-9518), PRIORITY (CVE-2019-9513), header compression (CVE-2016-6581), zero windows (CVE-2019-9517).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from embedserve.v1 import embedding_pb2 as pb
from tests.conformance.frames import EMBED, ENHANCE_YOUR_CALM, STREAM, connected, data, grpc_message, pieces, reset
from tests.integration.server.process import FAKE, QUICK, ServerProcess, running
from tests.security.beside import beside, until_active

pytestmark = pytest.mark.process
STALL_MS, AGE_MS, GRACE_MS = 300, 1000, 500
SHORT = ("--server.stream_stall_ms", str(STALL_MS))
AGING = ("--server.max_connection_age_ms", str(AGE_MS), "--server.max_connection_age_grace_ms", str(GRACE_MS))
MESSAGE = grpc_message(pb.EmbedRequest(texts=["hello world"]).SerializeToString())


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running(*QUICK, *SHORT, command=FAKE) as made:
        yield made
        assert made.stop() == 0


@pytest.fixture(scope="module")
def aging() -> Iterator[ServerProcess]:
    """Connections are ended after a second and a half."""
    with running(*QUICK, *AGING, command=FAKE) as made:
        yield made
        assert made.stop() == 0


class TestReset:
    async def test_rapid_reset_of_calls_that_have_begun(self, server: ServerProcess) -> None:
        """600 whole requests, each taken back 10 ms later: work that is not wanted is not in the way of others."""
        async with beside(server), connected(server.address) as raw:
            for first in range(1, 1200, 40):
                ids = range(first, first + 40, 2)
                await raw.send(*(frame for i in ids for frame in (raw.call(i), data(i, MESSAGE))))
                await asyncio.sleep(0.01)
                await raw.send(*(reset(i) for i in ids))

    async def test_rapid_reset_back_to_back(self, server: ServerProcess) -> None:
        async with beside(server), connected(server.address) as raw:
            for first in range(1, 6000, 200):
                await raw.send(*(frame for i in range(first, first + 200, 2) for frame in (raw.call(i), reset(i))))

    async def test_more_streams_than_allowed(self, server: ServerProcess) -> None:
        """Beyond ``server.max_concurrent_streams`` a stream is refused or the connection ended, not kept."""
        async with beside(server), connected(server.address) as raw:
            await raw.send(*(raw.call(i) for i in range(1, 8000, 2)))
            await raw.until(lambda f: isinstance(f, GoAwayFrame) or (f.stream_id > 0 and f.type == 3))


class TestFrames:
    async def test_continuation_flood(self, server: ServerProcess) -> None:
        """2000 frames of headers that never end."""
        async with beside(server), connected(server.address) as raw:
            head = raw.encoder.encode([(f"x-{i}", "v" * 100) for i in range(9)])
            await raw.send(raw.call(1, flags=()), *(ContinuationFrame(1, head) for _ in range(2000)))
            await asyncio.sleep(0.2)

    @pytest.mark.parametrize(
        "frames", [SettingsFrame(0, {3: 100}), PriorityFrame(1, depends_on=3, stream_weight=5)], ids=type
    )
    async def test_flood_of_control_frames(self, server: ServerProcess, frames: Frame) -> None:
        async with beside(server), connected(server.address) as raw:
            for _ in range(20):
                await raw.send(*[frames] * 500)

    async def test_settings_flood_by_one_who_does_not_read(self, server: ServerProcess) -> None:
        """Each needs an answer, and none is taken: the answers must not pile up without end."""
        async with beside(server), connected(server.address) as raw:
            raw.reader._transport.pause_reading()  # type: ignore[attr-defined]
            flood = SettingsFrame(0, {3: 100}).serialize() * 1000
            for _ in range(30):
                raw.writer.write(flood)
            await asyncio.sleep(0.5)

    async def test_ping_flood_is_sent_away(self, server: ServerProcess) -> None:
        async with beside(server), connected(server.address) as raw:
            for _ in range(10):
                await raw.send(*[PingFrame(0, bytes(8))] * 500)
            await raw.ended()
        # What still comes in when the server closes makes a reset of it, which may overtake the GOAWAY.
        assert raw.goaway is None or raw.goaway.error_code == ENHANCE_YOUR_CALM

    async def test_empty_data_flood(self, server: ServerProcess) -> None:
        async with beside(server), connected(server.address) as raw:
            await raw.send(raw.call(1))
            for _ in range(20):
                await raw.send(*[DataFrame(1, b"")] * 500)
            await raw.send(data(1, MESSAGE))
            assert (await raw.trailers(1))["grpc-status"] == "0"

    async def test_header_compression_bomb(self, server: ServerProcess) -> None:
        """One entry of the dynamic table, named 4000 times: 16 MB of headers in 4 KB."""
        async with beside(server), connected(server.address) as raw:
            entry = raw.encoder.encode([("x-fill", "v" * 4000)])
            await raw.send(HeadersFrame(1, entry + bytes([0xBE]) * 4000, flags=["END_HEADERS", "END_STREAM"]))
            await raw.until(lambda f: f.stream_id == 1 or isinstance(f, GoAwayFrame))

    async def test_window_update_flood(self, server: ServerProcess) -> None:
        async with beside(server), connected(server.address) as raw:
            await raw.send(*(WindowUpdateFrame(0, window_increment=1) for _ in range(10_000)))
            await raw.send(raw.call(1), data(1, MESSAGE))
            assert (await raw.trailers(1))["grpc-status"] == "0"


class TestSlow:
    """What never comes to an end is ended."""

    async def test_headers_byte_by_byte(self, aging: ServerProcess) -> None:
        """Twenty connections, a byte each 20 ms and never the last one: all are ended by age."""

        async def drip() -> None:
            async with connected(aging.address) as raw:
                for byte in raw.call(1, EMBED, [("x-fill", "v" * 1000)]).serialize()[:-1]:
                    if raw.closed.is_set():
                        return
                    await raw.send(bytes([byte]))
                    await asyncio.sleep(0.02)
                raise AssertionError("never ended")

        async with beside(aging), asyncio.timeout(10):
            await asyncio.gather(*(drip() for _ in range(20)))

    @pytest.mark.parametrize("end", [False, True], ids=["open", "half-closed"])
    @pytest.mark.parametrize("size", [0, 3, 10], ids=["nothing", "half of the prefix", "half of the message"])
    async def test_requests_that_never_arrive_whole(self, aging: ServerProcess, size: int, end: bool) -> None:
        """100 calls without their message: no handler begins, and age and its grace end them with their connection.

        Core has no timer for them. One that is half-closed is never answered either: grpc.aio takes the missing
        message for a cancellation (1.85.1), where it should say INTERNAL.
        """
        async with beside(aging), connected(aging.address) as raw:
            for i in range(1, 200, 2):
                await raw.send(raw.call(i), data(i, MESSAGE[:size], end=end))
            await raw.ended(10)

    async def test_a_preface_that_never_ends(self, aging: ServerProcess) -> None:
        """It has no age yet: others are served, and leaving it is enough."""
        async with beside(aging), connected(aging.address, preface=b"") as raw:
            for byte in b"PRI * HTTP/2.0":
                await raw.send(bytes([byte]))
                await asyncio.sleep(0.01)

    async def test_a_reader_who_opens_no_window(self, server: ServerProcess) -> None:
        """Streams whose answers are never taken end by ``server.stream_stall_ms``, a unary call by its deadline."""
        texts = pb.EmbedStreamRequest(texts=[f"text {i}" for i in range(2000)]).SerializeToString()
        async with beside(server), connected(server.address, settings={4: 0}) as raw:
            for i in range(1, 40, 2):
                await raw.send(raw.call(i, STREAM), *pieces(i, grpc_message(texts)))
            await raw.send(raw.call(41, EMBED, [("grpc-timeout", "300m")]), data(41, MESSAGE))
            await until_active(server, lambda calls: calls >= 10)
            await until_active(server, lambda calls: calls <= 1)  # the ordinary client's own

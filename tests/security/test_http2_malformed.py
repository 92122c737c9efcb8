"""Bytes that are no gRPC: each ends its own connection or its own call, with the status that gRPC has for it."""

from __future__ import annotations

import asyncio
import gzip
import random
import ssl
from collections.abc import Iterator

import pytest
from hyperframe.frame import DataFrame

from embedserve.v1 import embedding_pb2 as pb
from tests.conformance.frames import EMBED, PREFACE, Connection, connected, data, grpc_message, pieces
from tests.integration.server.process import FAKE, QUICK, ServerProcess, running
from tests.security.beside import beside

pytestmark = pytest.mark.process
RESOURCE_EXHAUSTED = "8"
MIB = 1 << 20
HELLO = pb.EmbedRequest(texts=["hello world"]).SerializeToString()


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running(*QUICK, command=FAKE) as made:
        yield made
        assert made.stop() == 0


def client_hello() -> bytes:
    """What a TLS client says first."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="embedserve.example")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def frame(kind: int, body: bytes, *, stream_id: int = 0, flags: int = 0, length: int | None = None) -> bytes:
    """A frame with whatever length it claims."""
    size = len(body) if length is None else length
    return size.to_bytes(3, "big") + bytes([kind, flags]) + stream_id.to_bytes(4, "big") + body


class TestNotHttp2:
    @pytest.mark.parametrize(
        "spoken",
        [
            b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"POST /embedserve.v1.EmbeddingService/Embed HTTP/1.1\r\nContent-Length: 1\r\n\r\nx",
            b"\x16\x03\x01 TLS",
            random.Random(7).randbytes(4096),
            bytes(4096),
            PREFACE[:-2] + b"XX" + bytes(64),
        ],
        ids=["HTTP/1.1 GET", "HTTP/1.1 POST", "TLS", "garbage", "zeros", "a wrong preface"],
    )
    async def test_the_connection_is_ended(self, server: ServerProcess, spoken: bytes) -> None:
        async with beside(server), connected(server.address, preface=b"") as raw:
            await raw.send(client_hello() if spoken.endswith(b"TLS") else spoken)
            await raw.ended()

    async def test_garbage_after_a_good_beginning(self, server: ServerProcess) -> None:
        """Twenty seeds, each on a connection that has served a call."""
        async with beside(server):
            for seed in range(20):
                async with connected(server.address) as raw:
                    await raw.send(raw.call(1), data(1, grpc_message(HELLO)))
                    assert (await raw.trailers(1))["grpc-status"] == "0"
                    await raw.send(random.Random(seed).randbytes(20_000))


class TestFrames:
    @pytest.mark.parametrize(
        "bad",
        [
            frame(0x0, b"", stream_id=1, length=(1 << 24) - 1),
            frame(0x4, bytes(5)),
            frame(0x6, bytes(7)),
            frame(0x3, bytes(3), stream_id=1),
            frame(0x8, bytes(3)),
            frame(0x0, b"x"),
            frame(0x1, b"\x82", stream_id=2, flags=5),
            frame(0x9, b"\x82", stream_id=1, flags=4),
            frame(0x1, b"\xff" * 64, stream_id=1, flags=5),
            frame(0x1, b"\x40\xff\xff\xff\xff\xff\xff\xff\xff\xff", stream_id=1, flags=5),
            frame(0x8, b"\x7f\xff\xff\xff") * 3,
        ],
        ids=[
            "a length over the maximum", "SETTINGS of 5 bytes", "PING of 7", "RST_STREAM of 3", "WINDOW_UPDATE of 3",
            "DATA without a stream", "HEADERS of a server's stream", "CONTINUATION of nothing",
            "an index that HPACK has not", "an integer that HPACK cannot hold", "a window over 2^31",
        ],
    )  # fmt: skip
    async def test_a_malformed_frame_ends_its_connection_at_most(self, server: ServerProcess, bad: bytes) -> None:
        """Core tolerates some of them; then the connection must still work."""
        async with beside(server), connected(server.address) as raw:
            await raw.send(bad)
            await settled(raw)

    async def test_mutations_of_a_good_call(self, server: ServerProcess) -> None:
        """200 connections, each with some bytes of preface, headers and message changed; seeds 0 to 199."""
        async with beside(server):
            for seed in range(200):
                rng = random.Random(seed)
                async with connected(server.address, preface=b"") as raw:
                    spoken = bytearray(PREFACE + frame(0x4, b"") + raw.call(1).serialize())
                    spoken += data(1, grpc_message(HELLO)).serialize()
                    for _ in range(rng.randint(1, 6)):
                        spoken[rng.randrange(len(PREFACE), len(spoken))] = rng.randrange(256)
                    await raw.send(bytes(spoken))
                    await asyncio.sleep(0)


async def settled(raw: Connection) -> None:
    """The connection has been ended, or serves a call on a stream that nobody has touched."""
    await raw.send(raw.call(101), data(101, grpc_message(HELLO)))
    served = asyncio.ensure_future(raw.until(lambda f: f.stream_id == 101 and "END_STREAM" in f.flags))
    ended = asyncio.ensure_future(raw.ended())
    done, left = await asyncio.wait((served, ended), return_when=asyncio.FIRST_COMPLETED)
    for future in left:
        future.cancel()
    assert raw.closed.is_set() or served in done
    await asyncio.gather(served, ended, return_exceptions=True)


class TestSizes:
    async def test_a_gzip_bomb(self, server: ServerProcess) -> None:
        """64 MiB of zeros in 64 KB: refused while it is unpacked, over ``server.max_receive_message_bytes``."""
        bomb = gzip.compress(bytes(64 * MIB))
        assert len(bomb) < 70_000
        async with beside(server) as cost, connected(server.address) as raw:
            for i in (1, 3, 5, 7):
                await raw.send(
                    raw.call(i, EMBED, [("grpc-encoding", "gzip")]), *pieces(i, grpc_message(bomb, compressed=True))
                )
                assert (await raw.trailers(i))["grpc-status"] == RESOURCE_EXHAUSTED
        assert cost.growth < 64 * MIB, "less than one bomb unpacked"

    async def test_a_length_that_nobody_could_send(self, server: ServerProcess) -> None:
        """4 GiB are announced and refused by their length alone."""
        async with beside(server, growth_max=32 * MIB), connected(server.address) as raw:
            await raw.send(raw.call(1), DataFrame(1, b"\x00\xff\xff\xff\xff" + bytes(100)))
            assert (await raw.trailers(1))["grpc-status"] == RESOURCE_EXHAUSTED

    @pytest.mark.parametrize("named", [20, 1000, 3000])
    async def test_metadata_over_the_limit(self, server: ServerProcess, named: int) -> None:
        """Small when compressed, up to 12 MB when not: the limit is on what it becomes, and nothing of it is kept.

        Core counts the compressed bytes; the guard counts again, as RFC 7541 does.
        """
        async with beside(server), connected(server.address) as raw:
            for i in range(1, 100, 2):
                head = raw.call(i, EMBED, [("x-fill", "0" * 4000)])
                head.data += bytes([0xBE]) * named  # the newest entry of the table, once more
                await raw.send(head)
            assert all("END_STREAM" not in f.flags for f in raw.received), "their messages are not here"
            for i in range(1, 100, 2):
                await raw.send(data(i, grpc_message(HELLO)))
            for i in range(1, 100, 2):
                assert (await raw.trailers(i))["grpc-status"] == RESOURCE_EXHAUSTED
            if named <= 1000:  # Core itself refuses more, and now and then one of these, without a word
                said = [raw.headers[i].get("grpc-message", "") for i in range(1, 100, 2)]
                assert any("server.max_metadata_bytes" in words for words in said)
            await raw.send(raw.call(101), data(101, grpc_message(HELLO)))
            assert (await raw.trailers(101))["grpc-status"] == "0"

    @pytest.mark.parametrize(
        ("raw_message", "statuses"),
        [(grpc_message(HELLO) * 2, {"0", "12", "13"}), (b"\x07" + grpc_message(HELLO)[1:], {"3", "12", "13"})],
        ids=["two messages", "an unknown flag"],
    )
    async def test_not_one_plain_message(self, server: ServerProcess, raw_message: bytes, statuses: set[str]) -> None:
        """Answered all the same (Core reads the first of two)."""
        async with beside(server), connected(server.address) as raw:
            await raw.send(raw.call(1), data(1, raw_message))
            assert (await raw.trailers(1))["grpc-status"] in statuses

"""A gRPC client by hand: right where a server, or a proxy before it, is not simple."""

from __future__ import annotations

import asyncio
import base64

import pytest
from google.rpc import error_details_pb2, status_pb2
from hpack import Decoder, Encoder
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from loadtest.header_block import fields_of
from loadtest.targets.embedserve import _refusal
from loadtest.wire_client import GIVE_BACK, PREFACE, Connection
from tests.unit.loadtest.frames import answer_frames


class Wire:
    """Both ends of a connection: what the client writes comes out as frames, frames of a server go in."""

    def __init__(self, **settings: int) -> None:
        self.written = b""
        self.closed = False
        self.client = Connection("host:1", "/service/Method", 1.0, (("x-tenant", "t" * 300),))
        self.client.connection_made(self)
        names = {"window": SettingsFrame.INITIAL_WINDOW_SIZE, "streams": SettingsFrame.MAX_CONCURRENT_STREAMS,
                 "frame": SettingsFrame.MAX_FRAME_SIZE}  # fmt: skip
        self.give(SettingsFrame(settings={names[name]: value for name, value in settings.items()}))

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def give(self, *frames: Frame) -> None:
        self.client.data_received(b"".join(frame.serialize() for frame in frames))

    def frames(self) -> list[Frame]:
        """What has been written since the last time."""
        data = self.written.removeprefix(PREFACE)
        self.written = b""
        found = []
        while data:
            frame, size = Frame.parse_frame_header(memoryview(data[:9]))
            frame.parse_body(memoryview(data[9 : 9 + size]))
            found.append(frame)
            data = data[9 + size :]
        return found

    def body(self, stream: int) -> bytes:
        return b"".join(bytes(f.data) for f in self.frames() if isinstance(f, DataFrame) and f.stream_id == stream)

    def answer(self, stream: int, message: bytes = b"vector", *, huffman: bool = False, **trailers: str) -> None:
        self.give(*answer_frames(stream, message, huffman=huffman, **trailers))


def begun(coroutine):
    return asyncio.ensure_future(coroutine)


async def turn() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


class TestCalls:
    async def test_a_call_is_a_post_with_its_deadline_and_metadata(self):
        wire = Wire()
        call = begun(wire.client.exchange(b"text"))
        await turn()
        (head, *_) = (f for f in wire.frames() if isinstance(f, HeadersFrame))
        fields = dict(Decoder().decode(head.data))
        assert fields[":method"] == "POST"
        assert fields[":path"] == "/service/Method"
        assert fields["grpc-timeout"] == "1000m"
        assert fields["x-tenant"] == "t" * 300
        wire.answer(1)
        assert (await call).messages() == [b"vector"]

    async def test_every_frame_may_come_in_pieces(self):
        wire = Wire()
        call = begun(wire.client.exchange(b"text"))
        await turn()
        pieces = Wire.__new__(Wire)
        pieces.client = type("Sink", (), {"data_received": lambda _self, data: pieces.data.append(data)})()
        pieces.data = []
        pieces.answer(1, b"v" * 1000)
        for byte in b"".join(pieces.data):
            wire.client.data_received(bytes([byte]))
        assert (await call).messages() == [b"v" * 1000]

    async def test_a_proxy_s_huffman_code_is_read(self):
        wire = Wire()
        call = begun(wire.client.exchange(b"text"))
        await turn()
        wire.answer(1, huffman=True, grpc_status="8", grpc_retry_pushback_ms="250")
        answer = await call
        assert (answer.code, answer.pushback_ms) == (8, 250.0)

    async def test_a_proxy_s_http_error_is_a_status(self):
        wire = Wire()
        call = begun(wire.client.exchange(b"text"))
        await turn()
        wire.give(HeadersFrame(1, Encoder().encode([(":status", "503")]), flags=["END_HEADERS", "END_STREAM"]))
        assert (await call).code == 14

    async def test_the_reason_of_a_refusal_is_read(self):
        status = status_pb2.Status(code=8)
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="embedserve"))
        packed = base64.b64encode(status.SerializeToString()).decode().rstrip("=")
        wire = Wire()
        call = begun(wire.client.exchange(b"text"))
        await turn()
        wire.answer(1, grpc_status="8", grpc_status_details_bin=packed)
        reply = _refusal("RESOURCE_EXHAUSTED", await call)
        assert (reply.reason, reply.retry_after_ms) == ("QUEUE_FULL", None)

    @pytest.mark.parametrize(("reset", "code"), [(7, 14), (8, 1), (11, 8), (2, 13)])
    async def test_a_reset_is_a_status(self, reset, code):
        wire = Wire()
        call = begun(wire.client.exchange(b"text"))
        await turn()
        wire.give(RstStreamFrame(1, error_code=reset))
        assert (await call).code == code


class TestFlowControl:
    async def test_a_large_request_goes_in_frames_and_waits_for_both_windows(self):
        wire = Wire(window=100_000)
        message = bytes(range(256)) * 600  # 153,600 bytes
        call = begun(wire.client.exchange(message))
        await turn()
        first = wire.body(1)
        assert len(first) == 65_535  # the connection's window is smaller than the stream's
        wire.give(WindowUpdateFrame(0, window_increment=1_000_000))
        second = wire.body(1)
        assert len(first + second) == 100_000
        wire.give(WindowUpdateFrame(1, window_increment=1_000_000))
        frames = [f for f in wire.frames() if isinstance(f, DataFrame)]
        assert max(len(f.data) for f in frames) <= 16_384
        assert "END_STREAM" in frames[-1].flags
        assert (
            first + second + b"".join(bytes(f.data) for f in frames)
            == b"\0" + len(message).to_bytes(4, "big") + message
        )
        wire.answer(1)
        assert (await call).code == 0

    async def test_a_stream_whose_window_is_used_up_does_not_hold_others_up(self):
        wire = Wire(window=1000)
        wire.give(WindowUpdateFrame(0, window_increment=1_000_000))
        first, second = begun(wire.client.exchange(b"a" * 5000)), begun(wire.client.exchange(b"b" * 500))
        await turn()
        data = [f for f in wire.frames() if isinstance(f, DataFrame)]
        assert sum(len(f.data) for f in data if f.stream_id == 1) == 1000
        assert sum(len(f.data) for f in data if f.stream_id == 3) == 505
        wire.answer(3)
        assert (await second).code == 0
        # Settings may widen windows that are open.
        wire.give(SettingsFrame(settings={SettingsFrame.INITIAL_WINDOW_SIZE: 10_000}))
        assert len(wire.body(1)) == 4005
        wire.answer(1)
        assert (await first).code == 0

    async def test_the_server_s_window_is_given_back(self):
        """Or a connection would stand still after 2 GiB of vectors."""
        wire = Wire()
        call = begun(wire.client.exchange(b"text"))
        await turn()
        wire.frames()
        wire.client._unread = GIVE_BACK - 1
        wire.answer(1)
        await call
        (update,) = (f for f in wire.frames() if isinstance(f, WindowUpdateFrame))
        assert (update.stream_id, update.window_increment) == (0, GIVE_BACK - 1 + len(b"vector") + 5)

    async def test_an_answer_before_the_request_is_read_resets_the_rest(self):
        wire = Wire(window=100)
        call = begun(wire.client.exchange(b"a" * 5000))
        await turn()
        wire.frames()
        wire.answer(1, grpc_status="8")
        assert (await call).code == 8
        assert [f.stream_id for f in wire.frames() if isinstance(f, RstStreamFrame)] == [1]

    async def test_more_calls_than_the_server_takes_wait_their_turn(self):
        wire = Wire(streams=1)
        first, second = begun(wire.client.exchange(b"a")), begun(wire.client.exchange(b"b"))
        await turn()
        assert {f.stream_id for f in wire.frames() if isinstance(f, HeadersFrame)} == {1}
        wire.answer(1)
        await first
        await turn()
        assert {f.stream_id for f in wire.frames() if isinstance(f, HeadersFrame)} == {3}
        wire.answer(3)
        assert (await second).code == 0


class TestEndings:
    async def test_a_call_ends_at_its_deadline_and_is_reset(self):
        wire = Wire()
        answer = await wire.client.exchange(b"text", 0.01)
        assert answer.code == 4
        assert [f.error_code for f in wire.frames() if isinstance(f, RstStreamFrame)] == [8]

    async def test_a_caller_who_goes_away_resets_its_call(self):
        wire = Wire()
        call = begun(wire.client.exchange(b"text"))
        await turn()
        call.cancel()
        await turn()
        assert call.cancelled()
        assert [f.stream_id for f in wire.frames() if isinstance(f, RstStreamFrame)] == [1]

    async def test_a_server_that_leaves_ends_what_it_has_and_takes_no_more(self):
        wire = Wire()
        kept, lost = begun(wire.client.exchange(b"a")), begun(wire.client.exchange(b"b"))
        await turn()
        wire.give(GoAwayFrame(last_stream_id=1))
        assert (await lost).code == 14
        assert not wire.client.usable
        assert not wire.closed
        wire.answer(1)
        assert (await kept).code == 0
        assert wire.closed

    async def test_a_lost_connection_ends_every_call(self):
        wire = Wire(streams=1)
        calls = [begun(wire.client.exchange(b"a")) for _ in range(3)]
        await turn()
        wire.closed = True
        wire.client.connection_lost(None)
        assert [(await call).code for call in calls] == [14, 14, 14]

    async def test_a_ping_is_answered(self):
        wire = Wire()
        wire.frames()
        wire.give(PingFrame(opaque_data=b"12345678"))
        (pong,) = wire.frames()
        assert pong.flags == {"ACK"}
        assert pong.opaque_data == b"12345678"


class TestHeaderBlocks:
    def test_long_values_and_static_entries_are_read_by_hand(self):
        encoder = Encoder()
        encoder.header_table_size = 0
        fields = [(":status", "200"), ("content-type", "application/grpc"), ("grpc-status", "8"), ("x", "v" * 5000)]
        found = fields_of(encoder.encode(fields, huffman=False))
        assert found[b":status"] == b"200"
        assert found[b"grpc-status"] == b"8"
        assert found[b"x"] == b"v" * 5000

    @pytest.mark.parametrize("block", [b"\x00\x05ab", b"\xff\xff", b"\x00\x85\xff\xff\xff\xff\xff\x01a"])
    def test_nonsense_is_called_so(self, block):
        with pytest.raises(ValueError, match="header block"):
            fields_of(block)

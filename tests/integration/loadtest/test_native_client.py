"""The load generator in C++ against a server that is not simple: frame by frame, over a real socket."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable
from contextlib import asynccontextmanager

import numpy as np
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

from loadtest.header_block import literal
from loadtest.native.volley import Unavailable, Volley, load_library
from loadtest.plan import Crowd, Plan
from loadtest.targets.embedserve import _refusal
from loadtest.wire_client import GIVE_BACK, PREFACE, head_of
from tests.unit.loadtest.frames import answer_frames

try:
    LIBRARY = load_library()
except Unavailable as why:
    pytest.skip(str(why), allow_module_level=True)

WINDOW, STREAMS = SettingsFrame.INITIAL_WINDOW_SIZE, SettingsFrame.MAX_CONCURRENT_STREAMS
OK, CANCELLED, UNKNOWN, DEADLINE_EXCEEDED, EXHAUSTED, INTERNAL, UNAVAILABLE = 0, 1, 2, 4, 8, 13, 14


class Peer(asyncio.Protocol):
    """One connection, as the server has it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.bodies: dict[int, bytes] = {}
        self.resets: list[tuple[int, int]] = []
        self.frames: list[Frame] = []
        self.unread = b""

    def connection_made(self, transport) -> None:
        self.transport = transport
        self.server.peers.append(self)
        self.give(SettingsFrame(settings=self.server.settings))

    def give(self, *frames: Frame) -> None:
        self.transport.write(b"".join(frame.serialize() for frame in frames))

    def data_received(self, data: bytes) -> None:
        self.unread = (self.unread + data).removeprefix(PREFACE)
        while len(self.unread) >= 9:
            frame, size = Frame.parse_frame_header(memoryview(self.unread[:9]))
            if len(self.unread) < 9 + size:
                return
            frame.parse_body(memoryview(self.unread[9 : 9 + size]))
            self.unread = self.unread[9 + size :]
            self.frames.append(frame)
            self.take(frame)

    def take(self, frame: Frame) -> None:
        number = frame.stream_id
        if isinstance(frame, HeadersFrame):
            self.server.fields.append(dict(Decoder().decode(frame.data)))
            self.bodies[number] = b""
            self.server.open += 1
            self.server.most_open = max(self.server.open, self.server.most_open)
        elif isinstance(frame, DataFrame):
            self.bodies[number] += frame.data
            self.server.on_data(self, number)
            if "END_STREAM" in frame.flags:
                self.server.bodies.append(self.bodies[number])
                self.server.on_call(self, number)
        elif isinstance(frame, RstStreamFrame):
            self.server.open -= 1
            self.resets.append((number, frame.error_code))

    def end(self, number: int, *frames: Frame) -> None:
        self.server.open -= 1
        self.give(*frames)

    def answer(self, number: int, message: bytes = b"vector", *, huffman: bool = False, **trailers: str) -> None:
        self.end(number, *answer_frames(number, message, huffman=huffman, **trailers))


class Server:
    """What every connection does, and what it saw."""

    def __init__(self) -> None:
        self.settings: dict[int, int] = {}
        self.on_call: Callable[[Peer, int], None] = lambda peer, number: peer.answer(number)
        self.on_data: Callable[[Peer, int], None] = lambda _peer, _number: None
        self.peers: list[Peer] = []
        self.fields: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        self.open = self.most_open = 0
        self.address = ""

    async def volley(self, *messages: bytes, arrivals=(), crowd=None, ends=10.0, **options):
        """Send a plan; what became of each call, and how many were not sent."""
        plan = Plan(
            calls=messages,
            arrivals=np.array(arrivals, dtype=float),
            phases=np.zeros(len(arrivals), np.uint16),
            crowds=() if crowd is None else (crowd,),
            start=time.monotonic() + 0.02,
            ends=ends,
            in_flight_max=options.pop("in_flight_max", 1000),
        )
        given = {"connections": 1, "give_up_s": 5.0, "keep": True} | options
        head = head_of(self.address, "/service/Method", 1.0, (("x-tenant", "t" * 300),))
        volley = Volley(LIBRARY, self.address, head, messages, plan, **given)
        try:
            await asyncio.to_thread(volley.run)
            ended, _, unsent, _ = volley.progress()
            calls = list(volley.take())
            assert len(calls) == ended
            return calls, unsent
        finally:
            volley.close()

    async def codes(self, *messages: bytes, **options) -> list[int]:
        calls, _ = await self.volley(*messages, **options)
        return [call.answer.code for call in calls]


@pytest.fixture
async def server():
    made = Server()
    listening = await asyncio.get_running_loop().create_server(lambda: Peer(made), "127.0.0.1", 0)
    made.address = f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    yield made
    listening.close()
    for peer in made.peers:
        peer.transport.abort()


@asynccontextmanager
async def nobody():
    made = Server()
    listening = await asyncio.get_running_loop().create_server(asyncio.Protocol, "127.0.0.1", 0)
    made.address = f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    listening.close()
    await listening.wait_closed()
    yield made


def slowly(peer: Peer, number: int) -> None:
    """Others can come meanwhile."""
    asyncio.get_running_loop().call_later(0.005, peer.answer, number)


class TestCalls:
    async def test_a_call_is_a_post_with_its_deadline_metadata_and_message(self, server):
        (call,), _ = await server.volley(b"text", arrivals=[0.0])
        (fields,) = server.fields
        assert fields[":method"] == "POST"
        assert fields[":path"] == "/service/Method"
        assert fields["grpc-timeout"] == "1000m"
        assert fields["x-tenant"] == "t" * 300
        assert server.bodies == [b"\0\0\0\0\x04text"]
        assert (call.answer.code, call.answer.messages()) == (OK, [b"vector"])
        assert 0 <= call.meant <= call.sent <= call.answer.first_at <= call.ended

    async def test_an_open_loop_keeps_to_its_instants_whatever_the_server_does(self, server):
        held = []

        def hold(peer: Peer, number: int) -> None:
            held.append(number)
            if len(held) == 5:
                for each in held:
                    peer.answer(each)

        server.on_call = hold
        arrivals = [0.0, 0.02, 0.02, 0.03, 0.06]
        calls, _ = await server.volley(b"a", b"b", arrivals=arrivals)
        assert sorted(call.meant for call in calls) == arrivals
        assert all(call.sent >= call.meant for call in calls)
        assert all(call.ended >= 0.06 for call in calls), "the last call released them all"
        assert [body[5:] for body in server.bodies] == [b"a", b"b", b"a", b"b", b"a"]

    async def test_a_closed_loop_has_so_many_calls_open_and_begins_none_after_its_end(self, server):
        server.on_call = slowly
        calls, _ = await server.volley(b"a", crowd=Crowd(0.02, 0.12, 3, 7))
        assert server.most_open == 3
        assert len(calls) > 3
        assert {(call.phase, call.answer.code) for call in calls} == {(7, OK)}
        assert all(0.02 <= call.sent < 0.125 and call.meant == call.sent for call in calls)

    async def test_calls_beyond_what_may_be_open_are_not_sent_and_counted(self, server):
        server.on_call = lambda _peer, _number: None
        calls, unsent = await server.volley(b"a", arrivals=[0.0] * 10, in_flight_max=4, give_up_s=0.05)
        assert (len(calls), unsent) == (4, 6)

    async def test_every_frame_may_come_in_pieces(self, server):
        def answer(peer: Peer, number: int) -> None:
            whole = []
            peer.transport, transport = (
                type("Sink", (), {"write": lambda _, data: whole.append(data)})(),
                peer.transport,
            )
            peer.answer(number, b"v" * 100)
            peer.transport = transport

            async def drip() -> None:
                for byte in b"".join(whole):
                    transport.write(bytes([byte]))
                    await asyncio.sleep(0)

            server.dripping = asyncio.ensure_future(drip())

        server.on_call = answer
        (call,), _ = await server.volley(b"a", arrivals=[0.0])
        assert call.answer.messages() == [b"v" * 100]

    async def test_a_proxy_s_huffman_code_is_read(self, server):
        server.on_call = lambda peer, number: peer.answer(
            number, huffman=True, grpc_status="8", grpc_retry_pushback_ms="250"
        )
        (call,), _ = await server.volley(b"a", arrivals=[0.0])
        assert (call.answer.code, call.answer.pushback_ms) == (EXHAUSTED, 250.0)

    async def test_a_status_of_two_digits_is_none_of_one(self, server):
        server.on_call = lambda peer, number: peer.answer(number, grpc_status="07")
        assert await server.codes(b"a", arrivals=[0.0]) == [7]

    @pytest.mark.parametrize("trailers_only", [True, False])
    async def test_a_proxy_s_http_error_is_a_status(self, server, trailers_only):
        block = Encoder().encode([(":status", "503")])
        frames = (
            [HeadersFrame(1, block, flags=["END_HEADERS", "END_STREAM"])]
            if trailers_only
            else [
                HeadersFrame(1, block, flags=["END_HEADERS"]),
                HeadersFrame(1, literal("x", "y"), flags=["END_HEADERS", "END_STREAM"]),
            ]
        )
        server.on_call = lambda peer, number: peer.end(number, *frames)
        assert await server.codes(b"a", arrivals=[0.0]) == [UNAVAILABLE]

    async def test_the_reason_of_a_refusal_is_read(self, server):
        status = status_pb2.Status(code=8)
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="embedserve"))
        packed = base64.b64encode(status.SerializeToString()).decode().rstrip("=")
        server.on_call = lambda peer, number: peer.answer(number, grpc_status="8", grpc_status_details_bin=packed)
        (call,), _ = await server.volley(b"a", arrivals=[0.0])
        assert _refusal("RESOURCE_EXHAUSTED", call.answer).reason == "QUEUE_FULL"

    @pytest.mark.parametrize(("reset", "code"), [(7, UNAVAILABLE), (8, CANCELLED), (11, EXHAUSTED), (2, INTERNAL)])
    async def test_a_reset_is_a_status(self, server, reset, code):
        server.on_call = lambda peer, number: peer.end(number, RstStreamFrame(number, reset))
        assert await server.codes(b"a", arrivals=[0.0]) == [code]

    async def test_an_end_without_trailers_is_no_answer(self, server):
        server.on_call = lambda peer, number: peer.end(number, DataFrame(number, b"", flags=["END_STREAM"]))
        assert await server.codes(b"a", arrivals=[0.0]) == [UNKNOWN]


class TestFlowControl:
    async def test_a_large_request_goes_in_frames_and_waits_for_both_windows(self, server):
        server.settings = {WINDOW: 30_000}
        message = bytes(range(256)) * 400

        def grant(peer: Peer, number: int) -> None:
            size = len(peer.bodies[number])
            assert size <= 30_000 + granted[0]
            if size == 30_000 + granted[0]:
                granted[0] += 20_000
                peer.give(WindowUpdateFrame(number, 20_000), WindowUpdateFrame(0, 20_000))

        granted = [0]
        server.on_data = grant
        assert await server.codes(message, arrivals=[0.0]) == [OK]
        assert server.bodies == [b"\0" + len(message).to_bytes(4, "big") + message]
        assert granted[0] >= 80_000
        assert all(len(f.data) <= 16_384 for f in server.peers[0].frames if isinstance(f, DataFrame))

    async def test_a_stream_whose_window_is_used_up_does_not_hold_others_up(self, server):
        server.settings = {WINDOW: 100}
        calls, _ = await server.volley(b"l" * 1000, b"short", arrivals=[0.0, 0.01], give_up_s=0.1)
        assert [(call.request, call.answer.code) for call in calls] == [(1, OK), (0, DEADLINE_EXCEEDED)]

    async def test_a_smaller_window_than_was_promised_holds_what_is_on_its_way(self, server):
        """A window may be below nothing (RFC 9113, 6.9.2)."""
        server.settings = {WINDOW: 100}

        def shrink(peer: Peer, number: int) -> None:
            if len(peer.bodies[number]) == 100:
                peer.give(SettingsFrame(settings={WINDOW: 10}), WindowUpdateFrame(number, 50))
                asyncio.get_running_loop().call_later(0.03, peer.give, WindowUpdateFrame(number, 1000))

        server.on_data = shrink
        (call,), _ = await server.volley(b"l" * 500, arrivals=[0.0])
        sizes = [len(f.data) for f in server.peers[0].frames if isinstance(f, DataFrame)]
        assert call.answer.code == OK
        assert sizes == [100, 405]

    async def test_the_server_s_window_is_given_back(self, server):
        part = (1 << 24) - 1

        def answer(peer: Peer, number: int) -> None:
            peer.give(HeadersFrame(number, Encoder().encode([(":status", "200")]), flags=["END_HEADERS"]))
            for _ in range(17):
                peer.transport.write(part.to_bytes(3, "big") + b"\0\0" + number.to_bytes(4, "big") + bytes(part))
            peer.end(number, HeadersFrame(number, literal("grpc-status", "0"), flags=["END_HEADERS", "END_STREAM"]))

        server.on_call = answer
        assert await server.codes(b"a", arrivals=[0.0, 0.01], keep=False, give_up_s=20.0) == [OK, OK]
        given = [f.window_increment for f in server.peers[0].frames if isinstance(f, WindowUpdateFrame)][1:]
        assert len(given) == 2
        assert all(GIVE_BACK <= size < GIVE_BACK + part for size in given)

    async def test_an_answer_before_the_request_is_read_resets_the_rest(self, server):
        server.settings = {WINDOW: 10}
        server.on_data = lambda peer, number: (
            peer.answer(number, grpc_status="8") if len(peer.bodies[number]) == 10 else None
        )
        assert await server.codes(b"l" * 100, arrivals=[0.0, 0.05]) == [EXHAUSTED, EXHAUSTED]
        assert server.peers[0].resets[0] == (1, 8)

    async def test_more_calls_than_the_server_takes_wait_their_turn(self, server):
        server.settings = {STREAMS: 2}
        server.on_call = slowly
        assert await server.codes(b"a", crowd=Crowd(0.0, 0.1, 8, 0)) != []
        assert server.most_open == 2


class TestEndings:
    async def test_a_call_that_gets_no_answer_is_given_up_and_reset(self, server):
        server.on_call = lambda _peer, _number: None
        (call,), _ = await server.volley(b"a", arrivals=[0.0], give_up_s=0.05)
        assert call.answer.code == DEADLINE_EXCEEDED
        assert 0.05 <= call.ended - call.sent < 1.0
        assert server.peers[0].resets == [(1, 8)]

    async def test_a_server_that_leaves_ends_what_it_has_and_the_next_call_goes_elsewhere(self, server):
        def leave(peer: Peer, number: int) -> None:
            if peer is server.peers[0] and number == 3:
                peer.give(GoAwayFrame(0, last_stream_id=1))
                peer.answer(1)
            elif peer is not server.peers[0]:
                peer.answer(number)

        server.on_call = leave
        assert await server.codes(b"a", arrivals=[0.0, 0.01, 0.1]) == [UNAVAILABLE, OK, OK]
        assert len(server.peers) == 2

    async def test_a_lost_connection_ends_every_call_and_the_next_opens_another(self, server):
        def lose(peer: Peer, number: int) -> None:
            if peer is server.peers[0]:
                if number == 3:
                    peer.transport.abort()
            else:
                peer.answer(number)

        server.on_call = lose
        assert await server.codes(b"a", arrivals=[0.0, 0.01, 0.1]) == [UNAVAILABLE, UNAVAILABLE, OK]

    async def test_nobody_there_is_told_of_each_call_and_not_asked_without_end(self):
        async with nobody() as server:
            calls, _ = await server.volley(b"a", crowd=Crowd(0.0, 0.2, 2, 0))
        assert {(call.answer.code, call.connected) for call in calls} == {(UNAVAILABLE, False)}
        assert 2 <= len(calls) <= 60

    async def test_a_server_of_another_protocol_is_no_connection(self, server):
        server.settings = {}
        listening = await asyncio.get_running_loop().create_server(Web, "127.0.0.1", 0)
        server.address = f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        (call,), _ = await server.volley(b"a", arrivals=[0.0])
        listening.close()
        assert (call.answer.code, call.connected) == (UNAVAILABLE, False)

    async def test_a_ping_is_answered(self, server):
        def ping(peer: Peer, number: int) -> None:
            peer.give(PingFrame(0, b"12345678"))
            peer.answer(number)

        server.on_call = ping
        await server.volley(b"a", arrivals=[0.0, 0.02])
        pings = [f for f in server.peers[0].frames if isinstance(f, PingFrame)]
        assert [(f.opaque_data, "ACK" in f.flags) for f in pings] == [(b"12345678", True)] * len(pings) != []

    async def test_it_can_be_stopped(self, server):
        server.on_call = lambda _peer, _number: None
        plan = Plan(
            calls=[b"a"], arrivals=np.array([0.0, 30.0]), phases=np.zeros(2, np.uint16),
            start=time.monotonic(), ends=60.0, in_flight_max=9,
        )  # fmt: skip
        head = head_of(server.address, "/service/Method", None, ())
        volley = Volley(LIBRARY, server.address, head, [b"a"], plan, connections=1, give_up_s=None, keep=False)
        running = asyncio.ensure_future(asyncio.to_thread(volley.run))
        async with asyncio.timeout(10):
            while not server.bodies:  # noqa: ASYNC110 - the server sets no event
                await asyncio.sleep(0.001)
            volley.stop()
            await running
        assert [call.answer.code for call in volley.take()] == [DEADLINE_EXCEEDED]
        volley.close()
        volley.close()


class Web(asyncio.Protocol):
    """HTTP/1."""

    def connection_made(self, transport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        del data
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
        self.transport.close()

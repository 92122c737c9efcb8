"""Exceptions that quote a caller's text: the log says what failed and where, and no word of the text."""

from __future__ import annotations

import traceback

import grpc
import pytest

from embedserve.errors import ItemFailed
from embedserve.telemetry.withholding import without_messages
from embedserve.v1 import embedding_pb2 as pb
from tests.integration.server.process import LOOPBACK, QUICK, ServerProcess, running

CANARY = "zq7canary"
LEAKY = ("-m", "tests.security.leaky_server", *LOOPBACK)
LOUD = ("--telemetry.log_level", "debug", "--telemetry.log_requests", "all")


def speak(server: ServerProcess, *signs: str) -> list[str]:
    """Send the canary with each sign in both kinds of call; returns all that came back as words."""
    heard = []
    with grpc.insecure_channel(server.address) as channel:
        stub = server.stub(channel)
        for sign in signs:
            texts = [f"the {CANARY} said {sign} to the world"]
            try:
                stub.Embed(pb.EmbedRequest(texts=texts), timeout=10)
            except grpc.RpcError as error:
                heard.append(
                    f"{error.code()} {error.details()} {error.debug_error_string()} {error.trailing_metadata()}"
                )
            try:
                for message in stub.EmbedStream(pb.EmbedStreamRequest(texts=texts), timeout=10):
                    heard += [error.message for error in message.errors]
            except grpc.RpcError as error:
                heard.append(
                    f"{error.code()} {error.details()} {error.debug_error_string()} {error.trailing_metadata()}"
                )
    return heard


@pytest.mark.process
@pytest.mark.parametrize("form", ["json", "console"])
def test_what_fails_in_a_call(form: str) -> None:
    with running(*QUICK, *LOUD, "--telemetry.log_format", form, command=LEAKY) as server:
        heard = speak(server, "poison", "cut", "broken")
        server.stop()

    log = "\n".join(server.stderr)
    assert len(heard) == 6
    assert all("error id" in said for said in heard)
    assert CANARY not in "\n".join([*heard, *server.stdout]).lower()
    assert CANARY not in log.lower()
    for where in ("RuntimeError", "leaky_server.py", "internal_error"):
        assert where in log, "type and place are what is left to find the error by"


def chained() -> ValueError:
    """A foreign error, caused by one of ours, caused by a foreign one."""
    try:
        try:
            try:
                {}[CANARY]
            except KeyError as first:
                raise ItemFailed("text 3 makes the model fail, alone") from first
        except ItemFailed as second:
            raise ValueError(CANARY) from second
    except ValueError as third:
        return third


class TestWithoutMessages:
    def test_types_places_and_our_own_sentences_stay(self) -> None:
        error = chained()
        error.add_note(CANARY)

        shown = "".join(traceback.format_exception(without_messages(error)))

        assert CANARY not in shown
        for kept in ("KeyError: [withheld]", "ItemFailed: text 3 makes", "ValueError: [withheld]"):
            assert kept in shown
        assert shown.count("in chained") == 3

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError("x"), ItemFailed("text 3")])
    def test_what_can_hold_no_text_is_left_alone(self, error: Exception) -> None:
        assert without_messages(error) is error

    def test_a_chain_that_bites_its_tail_ends(self) -> None:
        one, two = ValueError("a"), ValueError("b")
        one.__cause__, two.__cause__ = two, one

        assert str(without_messages(one)) == "[withheld]"

    def test_an_error_that_cannot_say_what_it_is(self) -> None:
        """A ``__str__`` that raises must not hide the error."""

        class Mute(ValueError):
            def __str__(self) -> str:
                raise KeyError(CANARY)

        assert type(without_messages(Mute())).__name__ == "Mute"

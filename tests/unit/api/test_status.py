"""Every error of the tree as a client sees it."""

import inspect

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from embedserve import errors
from embedserve.api import status
from embedserve.api.refusal_details import refusal_status, retry_info
from embedserve.api.validation import MAX_ECHO_CHARACTERS
from embedserve.errors import EmbedServeError, Violation

SECRET = "/srv/models/secret.safetensors is 7 bytes short"


def raised(kind: type[EmbedServeError]) -> EmbedServeError:
    """An error of ``kind`` as it is raised in the service."""
    special = {
        errors.InvalidRequest: lambda: errors.InvalidRequest([Violation("texts[3]", "empty", "TEXT_EMPTY")]),
        errors.RevisionMismatch: lambda: errors.RevisionMismatch("old", "new"),
        errors.UnknownModel: lambda: errors.UnknownModel("asked", ["served"]),
        errors.Refusal: lambda: errors.Refusal("later", reason="LATER", retry_after_ms=100),
        errors.NotServing: lambda: errors.NotServing("draining", reason="DRAINING", retry_after_ms=100),
        errors.EngineStalled: lambda: errors.EngineStalled("silent", reason="ENGINE_STALLED", retry_after_ms=100),
        errors.Overloaded: lambda: errors.Overloaded(
            "busy", reason="QUEUE_FULL", policy="queue", retry_after_ms=1500, figures={"queued_tokens": 1e6}
        ),
        errors.ConfigError: lambda: errors.ConfigError([SECRET]),
    }
    return special.get(kind, lambda: kind(SECRET))()


TREE = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, EmbedServeError)]
OURS = [kind for kind in TREE if not issubclass(kind, (errors.CallerError, errors.Refusal, errors.DeadlineExpired))]


def details(reply: status.Reply) -> dict[str, Message]:
    (raw,) = [value for key, value in reply.trailers if key == "grpc-status-details-bin"]
    packed = status_pb2.Status.FromString(raw)
    assert packed.code == reply.code.value[0]
    assert packed.message == reply.message
    unpacked = {}
    for entry in packed.details:
        name = entry.TypeName().removeprefix("google.rpc.")
        unpacked[name] = getattr(error_details_pb2, name)()
        assert entry.Unpack(unpacked[name])
    return unpacked


def pushback(reply: status.Reply) -> str | None:
    return dict(reply.trailers).get("grpc-retry-pushback-ms")


class TestTree:
    @pytest.mark.parametrize("kind", TREE)
    def test_the_code_is_the_one_in_the_trees_drawing(self, kind: type[EmbedServeError]) -> None:
        """errors.py draws the tree with a status beside each class that a call can end with."""
        line = next((line for line in (errors.__doc__ or "").splitlines() if f"─ {kind.__name__} " in line), "")
        drawn = [code for code in grpc.StatusCode if code.name in line]

        if drawn:
            assert [status.reply(raised(kind)).code] == drawn

    def test_the_drawing_is_read(self) -> None:
        """The test above finds the statuses that it compares with."""
        assert sum(code.name in (errors.__doc__ or "") for code in grpc.StatusCode) >= 7

    @pytest.mark.parametrize("kind", TREE)
    def test_every_error_has_error_info(self, kind: type[EmbedServeError]) -> None:
        """A stable reason in our domain."""
        info = details(status.reply(raised(kind)))["ErrorInfo"]

        assert info.domain == "embedserve"
        assert info.reason == info.reason.upper() != ""

    @pytest.mark.parametrize("kind", OURS)
    def test_what_is_ours_shows_an_id_only(self, kind: type[EmbedServeError]) -> None:
        """Never the text of the exception, in no part of the answer."""
        reply = status.reply(raised(kind), error_id="0123456789abcdef")

        assert reply.error_id == "0123456789abcdef"
        assert "0123456789abcdef" in reply.message
        assert details(reply)["ErrorInfo"].metadata["error_id"] == "0123456789abcdef"
        assert "secret" not in repr(reply)
        assert pushback(reply) == "-1"

    @pytest.mark.parametrize("kind", OURS)
    def test_each_fault_has_its_own_id(self, kind: type[EmbedServeError]) -> None:
        """Made here when none is given."""
        assert status.reply(raised(kind)).error_id != status.reply(raised(kind)).error_id

    def test_a_new_subclass_is_spelled_as_its_parent(self) -> None:
        """Nobody has to remember a table."""

        class Throttled(errors.Overloaded):
            pass

        reply = status.reply(Throttled("no", reason="R", policy="p", retry_after_ms=None))

        assert reply.code is grpc.StatusCode.RESOURCE_EXHAUSTED

    @pytest.mark.parametrize("exception", [ValueError(SECRET), KeyError(SECRET), SystemExit(SECRET), MemoryError()])
    def test_what_is_not_of_the_tree(self, exception: BaseException) -> None:
        """INTERNAL with an id; the class name is kept for metrics only."""
        reply = status.unexpected(exception)

        assert reply.code is grpc.StatusCode.INTERNAL
        assert reply.error_type == type(exception).__name__
        assert reply.error_id is not None
        assert "secret" not in repr(reply)
        assert type(exception).__name__ not in repr((reply.message, reply.trailers))


class TestRefusals:
    def test_retry_info_and_pushback_agree(self) -> None:
        """Both are the estimate times one factor."""
        reply = status.reply(raised(errors.Overloaded), jitter=lambda: 1.1)
        delay = details(reply)["RetryInfo"].retry_delay

        assert pushback(reply) == "1650"
        assert (delay.seconds, delay.nanos) == (1, 650_000_000)
        assert reply.error_type == "QUEUE_FULL"

    def test_policy_and_figures_are_told(self) -> None:
        """So that a client's log says why."""
        info = details(status.reply(raised(errors.Overloaded)))["ErrorInfo"]

        assert (info.reason, dict(info.metadata)) == ("QUEUE_FULL", {"policy": "queue", "queued_tokens": "1e+06"})

    def test_hints_are_spread(self) -> None:
        """Over 0.8 to 1.2 of the estimate, so that clients do not come back together."""
        hints = [int(pushback(status.reply(raised(errors.Overloaded))) or 0) for _ in range(500)]

        assert 1200 <= min(hints) < 1300
        assert 1700 < max(hints) <= 1800

    @pytest.mark.parametrize(("left_ms", "told"), [(None, "1500"), (1501.0, "1500"), (1500.0, "-1"), (-3.0, "-1")])
    def test_who_has_no_time_to_wait_is_told_at_once(self, left_ms: float | None, told: str) -> None:
        """A client would sit its deadline out; RetryInfo still says when a new call may come."""
        reply = status.reply(raised(errors.Overloaded), left_ms=left_ms, jitter=lambda: 1.0)

        assert pushback(reply) == told
        assert details(reply)["RetryInfo"].retry_delay.ToMilliseconds() == 1500

    def test_who_has_no_time_to_wait_for_a_start_may_ask_elsewhere(self) -> None:
        """Nothing is said, so that the client's own backoff counts: another server may answer at once."""
        reply = status.reply(raised(errors.NotServing), left_ms=50.0, jitter=lambda: 1.0)

        assert pushback(reply) is None
        assert details(reply)["RetryInfo"].retry_delay.ToMilliseconds() == 100

    def test_a_hint_is_never_zero(self) -> None:
        """Zero would mean at once."""
        error = errors.NotServing("no", reason="R", retry_after_ms=0)

        assert pushback(status.reply(error)) == "1"

    def test_overload_without_an_estimate_means_never(self) -> None:
        """As scheduling's ``retry_after_ms=None`` says."""
        reply = status.reply(errors.Overloaded("no", reason="R", policy="p", retry_after_ms=None))

        assert pushback(reply) == "-1"
        assert "RetryInfo" not in details(reply)

    def test_not_serving_without_an_estimate_leaves_it_to_the_client(self) -> None:
        """Another server may answer at once."""
        reply = status.reply(errors.NotServing("no", reason="R", retry_after_ms=None))

        assert pushback(reply) is None


class TestRefusalBytes:
    @given(
        st.integers(0, 16),
        st.text(max_size=300),
        st.text(max_size=40),
        st.dictionaries(st.text(max_size=200), st.text(max_size=200), max_size=4),
        st.none() | st.integers(1, 2**31),
    )
    def test_are_those_of_the_generated_classes(
        self, code: int, message: str, reason: str, metadata: dict[str, str], wait_ms: int | None
    ) -> None:
        """Whatever is in them."""
        raw = refusal_status(code, message, reason, "embedserve", metadata)
        decoded = status_pb2.Status.FromString(raw if wait_ms is None else raw + retry_info(wait_ms))
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()

        assert (decoded.code, decoded.message) == (code, message)
        assert decoded.details[0].Unpack(info)
        assert info == error_details_pb2.ErrorInfo(reason=reason, domain="embedserve", metadata=metadata)
        if wait_ms is None:
            assert len(decoded.details) == 1
        else:
            assert decoded.details[1].Unpack(retry)
            assert retry.retry_delay.ToMilliseconds() == wait_ms


class TestInvalidRequests:
    def test_every_violation_with_its_reason(self) -> None:
        """Field, sentence and word."""
        error = errors.InvalidRequest([Violation(f"texts[{i}]", f"bad {i}", "TEXT_EMPTY") for i in range(20)])
        bad_request = details(status.reply(error))["BadRequest"]

        assert [(v.field, v.description, v.reason) for v in bad_request.field_violations] == [
            (f"texts[{i}]", f"bad {i}", "TEXT_EMPTY") for i in range(20)
        ]

    @pytest.mark.parametrize("description", ["x" * 100, "€" * 10_000, "\x00\n" * 300])
    def test_trailers_stay_small(self, description: str) -> None:
        """Under 8 KiB in all as base64, and the last place says how many are left out."""
        error = errors.InvalidRequest([Violation(f"texts[{i}]", description, "TEXT_EMPTY") for i in range(5000)])
        reply = status.reply(error)
        entries = details(reply)["BadRequest"].field_violations
        (raw,) = [value for key, value in reply.trailers if key == "grpc-status-details-bin"]

        assert len(raw) * 4 / 3 + 3 * len(reply.message.encode()) < 8192
        assert len(entries) >= 3
        assert entries[-1].description == f"{5000 - (len(entries) - 1)} more violations do not fit here"
        assert details(reply)["ErrorInfo"].metadata["violations"] == "5000"

    def test_a_callers_own_words_do_not_fill_the_answer(self) -> None:
        """Model names and revisions are cut."""
        for error in (errors.UnknownModel("x" * 100_000, ["m"]), errors.RevisionMismatch("x" * 100_000, "r")):
            assert sum(len(value) for _, value in status.reply(error).trailers) < 2048
        assert MAX_ECHO_CHARACTERS < 2048


class TestItemErrors:
    @pytest.mark.parametrize("kind", TREE)
    def test_code_is_that_of_the_call(self, kind: type[EmbedServeError]) -> None:
        """One text in a stream fails as one text alone would."""
        code, reason, message = status.item_error(raised(kind), error_id="0123456789abcdef")

        assert code == status.reply(raised(kind)).code.value[0]
        assert reason
        assert message
        assert "secret" not in message or kind not in OURS

    def test_a_violation_gives_its_own_reason(self) -> None:
        """Not the generic one."""
        assert status.item_error(raised(errors.InvalidRequest)) == (status.BAD_TEXT, "TEXT_EMPTY", "empty")

"""The published service config: gRPC takes it, and each of its numbers keeps the rule that it was chosen by."""

from __future__ import annotations

import copy
import json
from typing import Any

import grpc
import pytest

from embedserve.config import Config
from embedserve.v1 import embedding_pb2
from tests.integration.clients.fleet import SERVICE, published

METHODS = [method.name for method in embedding_pb2.DESCRIPTOR.services_by_name["EmbeddingService"].methods]
MOST_ATTEMPTS = 5
"""gRFC A6: more are cut to this by every client."""
C_CORE_EARLY_S = 1.0
"""By how much the C core's clients end a timeout of a service config early (grpc/grpc#34547)."""


def seconds(duration: str) -> float:
    assert duration.endswith("s")
    return float(duration[:-1])


def by_method(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The part for each method; every name is of our service and a method of it."""
    found: dict[str, dict[str, Any]] = {}
    for part in config["methodConfig"]:
        for name in part["name"]:
            assert name.keys() == {"service", "method"}
            assert name["service"] == SERVICE
            assert name["method"] not in found
            found[name["method"]] = part
    return found


def parsed(config: dict[str, Any]) -> str:
    """What gRPC says of a config: the channel's first call fails with it, or for want of a server."""
    with grpc.insecure_channel("ipv4:127.0.0.1:1", options=[("grpc.service_config", json.dumps(config))]) as channel:
        with pytest.raises(grpc.RpcError) as failed:
            channel.unary_unary(f"/{SERVICE}/GetLoad")(b"", timeout=10)
        return f"{failed.value.code().name}: {failed.value.details()}"


class TestParser:
    """gRPC's own parser is the schema."""

    def test_it_takes_the_config(self) -> None:
        assert parsed(published()).startswith("UNAVAILABLE: connections to all backends failing")

    @pytest.mark.parametrize(
        ("path", "value", "complaint"),
        [
            (("methodConfig", 0, "retryPolicy", "maxAttempts"), 1, "maxAttempts error:must be at least 2"),
            (("methodConfig", 0, "retryPolicy", "retryableStatusCodes"), ["BUSY"], "failed to parse status code"),
            (("methodConfig", 0, "timeout"), "ten", "timeout error:Not a duration"),
            (("loadBalancingConfig",), [{"random": {}}], "No known policies in list: random"),
            (("retryThrottling", "maxTokens"), 0, "maxTokens error:must be greater than 0"),
        ],
    )
    def test_it_would_refuse_a_mistake(self, path: tuple[Any, ...], value: Any, complaint: str) -> None:
        """So that the test above means something."""
        config = copy.deepcopy(published())
        place = config
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

        assert parsed(config).startswith("INVALID_ARGUMENT")
        assert complaint in parsed(config)


class TestRules:
    """What the parser lets pass in silence."""

    def test_no_part_is_misspelt(self) -> None:
        """Unknown names are ignored by every client."""
        config = published()

        assert config.keys() == {"loadBalancingConfig", "healthCheckConfig", "retryThrottling", "methodConfig"}
        for part in config["methodConfig"]:
            assert part.keys() <= {"name", "timeout", "waitForReady", "retryPolicy"}
            assert part.get("retryPolicy", {}).keys() <= {
                "maxAttempts", "initialBackoff", "maxBackoff", "backoffMultiplier", "retryableStatusCodes"
            }  # fmt: skip

    def test_every_method_has_its_part(self) -> None:
        assert sorted(by_method(published())) == sorted(METHODS)

    def test_servers_are_watched_by_the_name_that_health_knows(self) -> None:
        """With a policy that asks: pick_first ignores healthCheckConfig."""
        config = published()

        assert config["healthCheckConfig"] == {"serviceName": SERVICE}
        assert config["loadBalancingConfig"] == [{"round_robin": {}}]

    def test_retries_are_within_grpcs_limits(self) -> None:
        for part in published()["methodConfig"]:
            if policy := part.get("retryPolicy"):
                assert 2 <= policy["maxAttempts"] <= MOST_ATTEMPTS
                assert seconds(policy["initialBackoff"]) <= seconds(policy["maxBackoff"]) < seconds(part["timeout"])

    def test_only_what_may_go_well_unchanged_is_retried(self) -> None:
        """Methods that are never shed have no RESOURCE_EXHAUSTED of ours; GetLoad is asked again anyway."""
        codes = {
            method: set(part.get("retryPolicy", {}).get("retryableStatusCodes", ()))
            for method, part in by_method(published()).items()
        }

        assert codes == {
            "Embed": {"UNAVAILABLE", "RESOURCE_EXHAUSTED"},
            "EmbedStream": {"UNAVAILABLE", "RESOURCE_EXHAUSTED"},
            "CountTokens": {"UNAVAILABLE", "RESOURCE_EXHAUSTED"},
            "ListModels": {"UNAVAILABLE"},
            "GetModel": {"UNAVAILABLE"},
            "GetLoad": set(),
        }

    def test_retries_are_throttled(self) -> None:
        """A server that dies takes a token for each call under way; a storm must die out all the same."""
        throttling = published()["retryThrottling"]

        assert throttling == {"maxTokens": 100, "tokenRatio": 0.1}

    def test_timeouts_fit_the_server_and_the_clients(self) -> None:
        config, defaults = by_method(published()), Config()
        timeouts_s = {method: seconds(part["timeout"]) for method, part in config.items()}

        assert max(timeouts_s.values()) * 1000 <= defaults.server.max_request_ms
        # What is admitted is done within the drain time, or soon after: nobody gives up on it.
        assert timeouts_s["Embed"] * 1000 >= 3 * defaults.admission.throughput.max_drain_ms
        assert min(timeouts_s.values()) > 2 * C_CORE_EARLY_S

    def test_only_batch_jobs_wait_for_a_server(self) -> None:
        waiting = {method for method, part in by_method(published()).items() if part.get("waitForReady")}

        assert waiting == {"EmbedStream"}

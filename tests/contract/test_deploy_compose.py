"""``deploy/compose``: the service with all that its telemetry needs, and every part finds the next."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from embedserve.config import Config
from tests.contract.deployment import (
    DEPLOY,
    EXAMPLE,
    ROOT,
    assert_time_to_stop,
    configured,
    documented_metrics,
    documented_variables,
    load,
    port_of,
    run,
    tool,
)

FOLDER = DEPLOY / "compose"
FILE = FOLDER / "compose.yaml"
WITHOUT_HEALTH_CHECK = {"otel-collector"}
"""Its image holds nothing that could ask it; Prometheus does (compose.yaml)."""


def dot_env() -> dict[str, str]:
    lines = (FOLDER / ".env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """With the variables of ``.env`` put in, as compose does."""
    values = dot_env()
    text = re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], FILE.read_text(encoding="utf-8"))
    return dict(yaml.safe_load(text)["services"])


@pytest.fixture(scope="module")
def config(services: dict[str, Any]) -> Config:
    """What the service is told here."""
    return configured(EXAMPLE, services["embedserve"]["environment"])


def mounts(service: dict[str, Any]) -> dict[str, Path]:
    """What a container sees of this repository, by the path that it sees."""
    pairs = (mount.split(":") for mount in service.get("volumes", ()))
    return {pair[1]: (FOLDER / pair[0]).resolve() for pair in pairs if pair[0].startswith(".")}


def seconds(duration: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(s|m)", duration).groups()  # type: ignore[union-attr]
    return float(number) * {"s": 1, "m": 60}[unit]


def data_sources(page: Any) -> Iterator[dict[str, str]]:
    """Every data source that a dashboard refers to, but for Grafana's own (its annotations)."""
    if isinstance(page, dict):
        source = page.get("datasource")
        if isinstance(source, dict) and source.get("type") not in {"grafana", "datasource"}:
            yield source
    for part in page.values() if isinstance(page, dict) else page if isinstance(page, list) else ():
        yield from data_sources(part)


class TestCompose:
    """``compose.yaml`` by itself."""

    @pytest.mark.parametrize("more", [(), ("--file", "compose.cuda.yaml")], ids=["cpu", "cuda"])
    def test_compose_takes_it(self, more: tuple[str, ...]) -> None:
        compose = tool("docker-compose", "Debian: docker-compose")
        run(compose, "--file", FILE.name, *more, "config", "--quiet", cwd=FOLDER)

    def test_every_image_has_a_version(self, services: dict[str, Any]) -> None:
        for name, service in services.items():
            assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+(-\w+)?", service["image"]), name

    def test_every_service_is_bounded_restarted_and_without_privileges(self, services: dict[str, Any]) -> None:
        for name, service in services.items():
            assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}, name
            assert service["restart"] == "unless-stopped", name
            assert service["read_only"] is True, name
            assert service["cap_drop"] == ["ALL"], name
            assert service["security_opt"] == ["no-new-privileges:true"], name

    def test_every_service_that_can_be_asked_has_a_health_check(self, services: dict[str, Any]) -> None:
        assert {name for name, service in services.items() if "healthcheck" not in service} == WITHOUT_HEALTH_CHECK
        jobs = {job["job_name"] for job in load(FOLDER / "prometheus.yml")["scrape_configs"]}
        assert jobs >= WITHOUT_HEALTH_CHECK

    def test_nothing_is_published_beyond_loopback(self, services: dict[str, Any]) -> None:
        published = [port for service in services.values() for port in service.get("ports", ())]
        assert len(published) == 4
        assert all(port.startswith("127.0.0.1:") for port in published)

    def test_everything_that_is_mounted_is_there_and_read_only(self, services: dict[str, Any]) -> None:
        for name, service in services.items():
            for inside, outside in mounts(service).items():
                assert outside.exists(), f"{name}: {inside}"
            assert all(mount.endswith(":ro") for mount in service.get("volumes", ()) if mount.startswith(".")), name

    def test_every_variable_has_a_value_and_every_value_is_used(self) -> None:
        used = set(re.findall(r"\$\{(\w+)\}", FILE.read_text(encoding="utf-8")))
        assert used == set(dot_env()) - {"COMPOSE_PROJECT_NAME"}

    def test_dependencies_exist_and_are_asked_only_where_they_can_answer(self, services: dict[str, Any]) -> None:
        for service in services.values():
            needed = service.get("depends_on", {})
            assert set(needed) <= set(services)
            for name, how in needed.items() if isinstance(needed, dict) else ():
                assert how["condition"] != "service_healthy" or "healthcheck" in services[name]


class TestService:
    """``embedserve`` in it."""

    def test_its_ports_are_those_that_it_listens_on(self, services: dict[str, Any], config: Config) -> None:
        published = {tuple(map(int, port.split(":")[1:])) for port in services["embedserve"]["ports"]}
        listening = {*map(port_of, config.server.addresses), port_of(config.operations.address)}
        assert published == {(port, port) for port in listening}

    def test_it_has_the_time_that_its_drain_needs(self, services: dict[str, Any], config: Config) -> None:
        assert_time_to_stop(seconds(services["embedserve"]["stop_grace_period"]), config)

    def test_a_pass_is_spread_over_the_cores_that_it_may_use(self, services: dict[str, Any], config: Config) -> None:
        assert config.model.threads == int(services["embedserve"]["deploy"]["resources"]["limits"]["cpus"])

    def test_its_otel_variables_are_ones_that_are_read(self, services: dict[str, Any]) -> None:
        names = {name for name in services["embedserve"]["environment"] if name.startswith("OTEL_")}
        assert names
        assert names <= documented_variables()

    def test_it_is_built_from_targets_of_the_dockerfile(self, services: dict[str, Any]) -> None:
        dockerfile = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
        cuda = load(FOLDER / "compose.cuda.yaml")["services"]["embedserve"]
        build = services["embedserve"]["build"]
        assert (FOLDER / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).is_file()
        images = {build["target"]: services["embedserve"]["image"], cuda["build"]["target"]: cuda["image"]}
        assert len(images) == 2
        for target, image in images.items():
            assert f" AS {target}\n" in dockerfile
            assert image.endswith(f"-{target}")


class TestPrometheus:
    """Scrapes the service, and loads the rules of the dashboards."""

    def test_promtool_takes_the_configuration_with_the_rules(self, services: dict[str, Any], tmp_path: Path) -> None:
        """In the folders that the container has, so that relative paths are held to what is mounted."""
        promtool = tool("promtool", "Debian: prometheus")
        for inside, outside in mounts(services["prometheus"]).items():
            place = tmp_path / inside.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if outside.is_dir() else shutil.copy)(outside, place)
        (file,) = (word.partition("=")[2] for word in services["prometheus"]["command"] if "config.file" in word)
        said = run(promtool, "check", "config", tmp_path / file.lstrip("/"))
        files = list((ROOT / "dashboards" / "rules").glob("*.yml"))
        assert len(re.findall(r"SUCCESS: \d+ rules found", said)) == len(files) > 0

    def test_every_target_is_a_service_and_a_port_of_it(self, services: dict[str, Any], config: Config) -> None:
        collector = load(FOLDER / "otel-collector.yaml")["service"]["telemetry"]["metrics"]["readers"][0]
        ports = {
            "embedserve": port_of(config.operations.address),
            "otel-collector": collector["pull"]["exporter"]["prometheus"]["port"],
            "tempo": load(FOLDER / "tempo.yaml")["server"]["http_listen_port"],
            "prometheus": 9090,
        }
        targets = {
            job["job_name"]: job["static_configs"][0]["targets"]
            for job in load(FOLDER / "prometheus.yml")["scrape_configs"]
        }
        assert targets.pop("prometheus") == ["localhost:9090"]
        assert targets == {name: [f"{name}:{port}"] for name, port in ports.items() if name in targets}
        assert {*targets, "grafana", "prometheus"} == set(services)

    def test_exemplars_are_kept(self, services: dict[str, Any]) -> None:
        assert "--enable-feature=exemplar-storage" in services["prometheus"]["command"]


class TestCollector:
    """Takes what the service sends and hands it to Tempo."""

    @pytest.fixture
    def collector(self) -> dict[str, Any]:
        return dict(load(FOLDER / "otel-collector.yaml"))

    def test_pipelines_name_what_is_defined_and_nothing_is_defined_in_vain(self, collector: dict[str, Any]) -> None:
        pipelines = collector["service"]["pipelines"].values()
        for kind in ("receivers", "processors", "exporters"):
            assert {name for pipeline in pipelines for name in pipeline[kind]} == set(collector[kind]), kind
        assert set(collector["service"]["extensions"]) == set(collector["extensions"])

    def test_memory_is_guarded_before_anything_else(self, collector: dict[str, Any]) -> None:
        assert all(p["processors"][0] == "memory_limiter" for p in collector["service"]["pipelines"].values())

    def test_the_service_sends_to_it_and_it_to_tempo(self, collector: dict[str, Any], services: dict[str, Any]) -> None:
        receiver = collector["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"]
        endpoint = services["embedserve"]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"]
        assert endpoint == f"http://otel-collector:{port_of(receiver)}"
        tempo = load(FOLDER / "tempo.yaml")["distributor"]["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"]
        (exporter,) = collector["exporters"].values()
        assert exporter["endpoint"] == f"tempo:{port_of(tempo)}"

    def test_traces_are_pushed_and_metrics_are_not(self, collector: dict[str, Any], services: dict[str, Any]) -> None:
        """Prometheus scrapes them: both would count everything twice."""
        assert set(collector["service"]["pipelines"]) == {"traces"}
        assert services["embedserve"]["environment"]["OTEL_METRICS_EXPORTER"] == "prometheus"

    def test_each_is_told_to_read_the_file_that_it_is_given(self, services: dict[str, Any]) -> None:
        for name in ("otel-collector", "tempo", "prometheus"):
            (named,) = (word.partition("=")[2] for word in services[name]["command"] if "config" in word)
            assert named in mounts(services[name]), name

    def test_tempo_writes_only_where_it_may(self, services: dict[str, Any]) -> None:
        (place,) = (mount.partition(":")[0] for mount in services["tempo"]["tmpfs"])
        storage = load(FOLDER / "tempo.yaml")["storage"]["trace"]
        assert all(part["path"].startswith(f"{place}/") for part in (storage["local"], storage["wal"]))

    def test_tempo_is_asked_where_it_listens(self, services: dict[str, Any]) -> None:
        port = load(FOLDER / "tempo.yaml")["server"]["http_listen_port"]
        assert f"localhost:{port}/" in services["tempo"]["healthcheck"]["test"][-1]


class TestGrafana:
    """Data sources and dashboards, provisioned."""

    @pytest.fixture
    def sources(self) -> dict[str, Any]:
        listed = load(FOLDER / "grafana/provisioning/datasources/datasources.yaml")["datasources"]
        return {source["uid"]: source for source in listed}

    def test_each_source_is_where_its_service_listens(self, sources: dict[str, Any]) -> None:
        port = load(FOLDER / "tempo.yaml")["server"]["http_listen_port"]
        urls = {uid: source["url"] for uid, source in sources.items()}
        assert urls == {"prometheus": "http://prometheus:9090", "tempo": f"http://tempo:{port}"}
        assert [uid for uid, source in sources.items() if source.get("isDefault")] == ["prometheus"]

    def test_an_exemplar_leads_to_its_trace_and_a_span_to_metrics(self, sources: dict[str, Any]) -> None:
        (destination,) = sources["prometheus"]["jsonData"]["exemplarTraceIdDestinations"]
        exposition = (ROOT / "service/embedserve/telemetry/prometheus.py").read_text(encoding="utf-8")
        assert destination["datasourceUid"] in sources
        assert f'"{destination["name"]}": f"{{exemplar.trace_id' in exposition
        metrics = sources["tempo"]["jsonData"]["tracesToMetrics"]
        assert metrics["datasourceUid"] in sources
        names = {name for query in metrics["queries"] for name in re.findall(r"\w+_\w+(?=\{)", query["query"])}
        assert names
        assert names <= documented_metrics()

    def test_it_queries_no_finer_than_prometheus_scrapes(self, sources: dict[str, Any]) -> None:
        interval = load(FOLDER / "prometheus.yml")["global"]["scrape_interval"]
        assert sources["prometheus"]["jsonData"]["timeInterval"] == interval

    def test_the_dashboards_are_those_of_this_repository(self, services: dict[str, Any]) -> None:
        (provider,) = load(FOLDER / "grafana/provisioning/dashboards/dashboards.yaml")["providers"]
        assert mounts(services["grafana"])[provider["options"]["path"]] == ROOT / "dashboards"

    def test_what_the_dashboards_take_for_granted_is_provisioned(self, sources: dict[str, Any]) -> None:
        """A data source that a panel names by its uid, and not by a variable, is one of these."""
        pages = [json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "dashboards").glob("*.json")]
        named = {(source["type"], source["uid"]) for page in pages for source in data_sources(page)}
        assert named
        known = {(source["type"], uid) for uid, source in sources.items()}
        assert {(kind, uid) for kind, uid in named if not uid.startswith("$")} <= known
        assert {kind for kind, _ in named} <= {kind for kind, _ in known}

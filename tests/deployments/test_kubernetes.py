"""The manifests for Kubernetes: against the operators' own schemas, and what can be checked of them without a cluster."""

from __future__ import annotations

import gzip
import importlib
import json
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deployments.schema import AppArgs, check_serve_config

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "cluster_configs" / "kubernetes" / "rayservice.yaml"
SCHEMAS = ROOT / "tests" / "data" / "kubernetes"
MIB = {"Mi": 1, "Gi": 1024}


@pytest.fixture(scope="module")
def documents() -> dict[str, dict[str, Any]]:
    """By kind."""
    files = (MANIFEST, MANIFEST.with_name("podmonitor.yaml"))
    return {document["kind"]: document for path in files for document in yaml.safe_load_all(path.read_text())}


@pytest.fixture(scope="module")
def service(documents: dict[str, dict[str, Any]]) -> dict[str, Any]:
    spec: dict[str, Any] = documents["RayService"]["spec"]
    return spec


def groups(service: dict[str, Any]) -> Iterator[dict[str, Any]]:
    cluster = service["rayClusterConfig"]
    yield cluster["headGroupSpec"]
    yield from cluster["workerGroupSpecs"]


def size_mib(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([MG]i)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * MIB[unit]


def strict(schema: Any) -> Any:
    """As Kubernetes reads a resource's schema: it knows no fields besides those that are named."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    own = {name: strict(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        own.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    return own


@pytest.mark.parametrize("kind", ["RayService", "PodMonitor"])
def test_it_fits_its_operators_schema(documents: dict[str, dict[str, Any]], kind: str) -> None:
    schema = strict(json.loads(gzip.decompress((SCHEMAS / f"{kind.lower()}.json.gz").read_bytes())))
    schema["properties"]["metadata"] = {"type": "object"}
    validator = jsonschema.Draft4Validator(schema)
    wrong = {"/".join(map(str, error.absolute_path)): error.message for error in validator.iter_errors(documents[kind])}
    assert wrong == {}
    unknown = {**documents[kind], "spec": {**documents[kind]["spec"], "selectors": {}}}
    assert not validator.is_valid(unknown)


def test_what_it_serves_is_a_right_serve_config(service: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "serve_config.yaml"
    path.write_text(service["serveConfigV2"])
    assert check_serve_config(path) == []


def test_it_names_the_ray_that_is_tested(service: dict[str, Any]) -> None:
    assert service["rayClusterConfig"]["rayVersion"] == version("ray")


def test_the_pods_have_room_for_what_is_placed_on_them(service: dict[str, Any]) -> None:
    config = yaml.safe_load(service["serveConfigV2"])
    (application,) = config["applications"]
    args = AppArgs.model_validate(application["args"])
    head, workers = groups(service)
    assert args.ingress_num_cpus <= float(head["rayStartParams"]["num-cpus"]) < args.num_cpus  # no engine on the head
    (container,) = workers["template"]["spec"]["containers"]
    assert args.num_cpus <= float(container["resources"]["requests"]["cpu"])
    tiers_gib = (args.engine_config.gpu_memory_gib or 0) + args.engine_config.kv_offloading_size
    assert tiers_gib * 1024 < size_mib(container["resources"]["limits"]["memory"])
    (data,) = [volume for volume in workers["template"]["spec"]["volumes"] if volume["name"] == "data"]
    assert args.engine_config.kv_disk_size * 1024 < size_mib(data["emptyDir"]["sizeLimit"])
    replicas = {deployment["name"]: deployment["num_replicas"] for deployment in application["deployments"]}
    assert replicas["LLMServer"] <= workers["replicas"]


def test_volumes_ports_labels_and_secrets_fit_together(
    documents: dict[str, dict[str, Any]], service: dict[str, Any]
) -> None:
    label = documents["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    assert documents["PodMonitor"]["spec"]["selector"]["matchLabels"] == label
    ports = set()
    for group in groups(service):
        template = group["template"]
        assert template["metadata"]["labels"] == label
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        for container in template["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys()
            ports |= {port["name"] for port in container["ports"]}
            variables = {variable["name"] for variable in container["env"]}
            assert "PENSIEVE_API_KEY" in variables  # it listens to other machines
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                claim = documents["PersistentVolumeClaim"]["metadata"]["name"]
                assert volume["persistentVolumeClaim"]["claimName"] == claim
    assert {endpoint["port"] for endpoint in documents["PodMonitor"]["spec"]["podMetricsEndpoints"]} <= ports


def test_a_pod_that_goes_has_the_time_that_its_replica_takes(service: dict[str, Any]) -> None:
    (application,) = yaml.safe_load(service["serveConfigV2"])["applications"]
    (grace_s,) = [d["graceful_shutdown_timeout_s"] for d in application["deployments"] if d["name"] == "LLMServer"]
    _, workers = groups(service)
    spec = workers["template"]["spec"]
    *_, command = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    module, timeout_s = re.search(r"python -m (\S+) --timeout (\d+)", command).groups()  # type: ignore[union-attr]
    assert callable(importlib.import_module(module).main)
    assert grace_s < int(timeout_s) < spec["terminationGracePeriodSeconds"]


def test_the_image_is_made_of_what_is_there() -> None:
    """Files that it copies, the packages' extras, and the user that the pods run as."""
    text = (ROOT / "Containerfile").read_text().replace("\\\n", " ")
    instructions = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert {name for name, _ in instructions} <= {
        *("ARG", "FROM", "RUN", "WORKDIR", "ENV", "COPY", "VOLUME", "USER", "EXPOSE", "HEALTHCHECK", "CMD"),
    }
    copied = [source for name, rest in instructions if name == "COPY" for source in rest.split()[:-1]]
    kept = (ROOT / ".containerignore").read_text().split()
    for source in copied:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in kept, source
    port = yaml.safe_load((ROOT / "serve_config.yaml").read_text())["http_options"]["port"]
    assert ["EXPOSE", str(port)] in instructions
    user = yaml.safe_load_all(MANIFEST.read_text()).__next__()["spec"]["rayClusterConfig"]["headGroupSpec"]
    assert f"--uid {user['template']['spec']['securityContext']['runAsUser']} " in text

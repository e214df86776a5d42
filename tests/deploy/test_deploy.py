"""The files of deploy/. No Docker engine runs here: what they say is checked against schemas, against the program's own
options, and by running the program from the files that the image would hold."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from cli import health
from cli.overrides import ServeCommand, compose_serve
from cli.serve import SECONDS_TO_FINISH
from server.config import check_exposure

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["ingot"]
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def pod() -> dict[str, Any]:
    [found] = [manifest["spec"]["template"]["spec"] for manifest in MANIFESTS if manifest["kind"] == "Deployment"]
    return found


def served(arguments: list[str]) -> ServeCommand:
    assert arguments[0] == "serve"
    command = compose_serve(arguments[1:])
    with pytest.raises(ValueError, match="no key is set"):
        check_exposure(command.serve.host, {})
    assert command.serve.api_key_file is not None
    return command


def probed(command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The URL that a probe asks, from running it with another key file: nobody listens there."""
    assert command[:2] == ["ingot", "health"]
    keys = tmp_path / "keys"
    keys.write_text("one: abc\n")
    at = command.index("--api-key-file") + 1
    asked: list[str] = []

    def get(_: object, url: str, headers: dict[str, str]) -> None:
        asked.append(url)
        assert headers == {"Authorization": "Bearer abc"}
        raise health.httpx.ConnectError("refused")

    monkeypatch.setattr(health.httpx.Client, "get", get)
    with pytest.raises(ValueError, match="does not answer"):
        health.main([*command[2:at], str(keys), *command[at + 1 :]])
    return asked[0]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest["kind"])
def test_manifests_follow_the_schema_of_kubernetes(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, "1.33", strict=True)
    broken = {**manifest, "spec": {**manifest["spec"], "noSuchField": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.33", strict=True)


def follows_compose_spec(file: Path) -> tuple[bool, str]:
    """Whether the schema of the Compose specification, which the package check-jsonschema holds, accepts a file."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return ran.returncode == 0, ran.stdout + ran.stderr


def test_the_compose_file_follows_the_schema_of_compose(tmp_path: Path) -> None:
    holds, said = follows_compose_spec(DEPLOY / "compose.yaml")
    assert holds, said
    content = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for field, value in (("no_such_field", 1), ("healthcheck", {"interval": 15}), ("ports", "23333")):
        broken = {**content, "services": {"ingot": {**COMPOSE, field: value}}}
        (tmp_path / "compose.yaml").write_text(yaml.safe_dump(broken))
        holds, said = follows_compose_spec(tmp_path / "compose.yaml")
        assert not holds
        assert "ingot" in said


def test_the_pod_serves_probes_and_drains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    [container] = pod()["containers"]
    command = served(container["args"])
    key_file = command.serve.api_key_file
    [port] = container["ports"]
    assert port["containerPort"] == command.serve.port
    for name, path in (("startupProbe", "live"), ("readinessProbe", "ready"), ("livenessProbe", "live")):
        probe = container[name]
        assert probe["exec"]["command"][-1] == key_file
        asked = probed(probe["exec"]["command"], monkeypatch, tmp_path)
        assert asked == f"http://127.0.0.1:{command.serve.port}/health/{path}"
        assert probe["timeoutSeconds"] > health.SECONDS
    sleep, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep"
    needed = float(seconds) + command.serve.drain_timeout + SECONDS_TO_FINISH
    assert needed < pod()["terminationGracePeriodSeconds"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod()["volumes"]}
    assert key_file.startswith(mounts["keys"] + "/")
    assert mounts["store"] == "/ingot/store"


def test_kinds_find_each_other() -> None:
    kinds = {manifest["kind"]: manifest for manifest in MANIFESTS}
    labels = kinds["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert kinds["Deployment"]["spec"]["selector"]["matchLabels"] == kinds["Service"]["spec"]["selector"] == labels
    assert kinds["Service"]["spec"]["ports"][0]["targetPort"] == pod()["containers"][0]["ports"][0]["name"]
    claims = {volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod()["volumes"]}
    assert kinds["PersistentVolumeClaim"]["metadata"]["name"] in claims
    assert f"USER {pod()['securityContext']['runAsUser']}\n" in DOCKERFILE


def test_compose_serves_probes_and_drains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = served(COMPOSE["command"])
    kind, *probe = COMPOSE["healthcheck"]["test"]
    assert kind == "CMD"
    assert probe[-1] == command.serve.api_key_file
    assert probed(probe, monkeypatch, tmp_path) == f"http://127.0.0.1:{command.serve.port}/health/ready"
    assert command.serve.drain_timeout + SECONDS_TO_FINISH < float(COMPOSE["stop_grace_period"].removesuffix("s"))
    assert COMPOSE["ports"] == [f"127.0.0.1:{command.serve.port}:{command.serve.port}"]
    assert (DEPLOY / COMPOSE["build"]["context"]).resolve() == ROOT
    assert (ROOT / COMPOSE["build"]["dockerfile"]).is_file()
    assert [f"/run/secrets/{name}" for name in COMPOSE["secrets"]] == [command.serve.api_key_file]


def test_the_program_runs_from_what_the_image_holds(tmp_path: Path) -> None:
    copied = [shlex.split(line)[1:] for line in DOCKERFILE.splitlines() if line.startswith("COPY ")]
    sent = set((DEPLOY / "Dockerfile.dockerignore").read_text().splitlines())
    for *sources, target in copied:
        for source in sources:
            assert f"!{source}" in sent
            if (ROOT / source).is_dir():
                ignore = shutil.ignore_patterns("__pycache__", "results", "model", "text")
                shutil.copytree(ROOT / source, tmp_path / target, ignore=ignore)
            else:
                shutil.copy(ROOT / source, tmp_path / target)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for arguments, said in ((["serve", "--help"], "serve.drain_timeout: "), (["health", "--help"], "--api-key-file")):
        command = [sys.executable, "-m", "cli.main", *arguments]
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert (ran.returncode, said in ran.stdout) == (0, True), ran.stderr


def test_the_build_arguments_have_a_use_and_none_holds_a_key() -> None:
    arguments = set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
    assert arguments == {"BASE", "PACKAGES", "EXTRAS", "TORCH_INDEX"}
    for name in arguments:
        assert f"${{{name}" in DOCKERFILE
    assert 'ENTRYPOINT ["ingot"]' in DOCKERFILE
    assert "STOPSIGNAL SIGTERM" in DOCKERFILE

"""What can be checked of docker/ without an engine: hardening, commands, configs, queries, the Redis ACL."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import typer.main
import yaml
from prometheus_client import CollectorRegistry

from das.deadline import Deadline
from das.logit_store import LogitStore, RedisConfig
from das.schema import FeatureSchema
from services.cli import app
from services.embedded import free_port, redis_binary
from services.health import HealthConfig, HealthServer
from services.metrics import CATALOGUE
from services.replay.dataset import DatasetConfig
from services.settings import load, student_configs, teacher_config

DOCKER = Path(__file__).parents[2] / "docker"
ROOT = DOCKER.parent
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"] == "exfm:local"}
JOBS = {"topics", "replay"}
SCRAPE_LABELS = {"service", "instance", "job", "le"}


def dockerfile_env() -> dict[str, str]:
    """Settings that the image sets."""
    return dict(re.findall(r"(EXFM_[A-Z_]+)=(\S+)", (DOCKER / "Dockerfile").read_text()))


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_hardened_and_bounded(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["cap_drop"] == ["ALL"]
    assert int(service["user"].split(":")[0]) >= 400
    assert service["mem_limit"]
    assert service["pids_limit"]
    assert not {"privileged", "cap_add", "network_mode", "pid"} & set(service)
    assert name in JOBS or service["healthcheck"]["test"]
    assert service["image"].partition(":")[2] not in ("", "latest")


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_on_loopback_only_and_never_of_redis(name: str) -> None:
    ports = SERVICES[name].get("ports", [])
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert not (name == "redis" and ports)


def test_secrets_are_files_that_the_script_writes_and_no_variable_holds_one(tmp_path: Path) -> None:
    subprocess.run(["sh", str(DOCKER / "make-secrets.sh"), str(tmp_path)], check=True, capture_output=True)
    for secret in COMPOSE["secrets"].values():
        assert len((tmp_path / Path(secret["file"]).name).read_text().strip()) >= 16
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    subprocess.run(["sh", str(DOCKER / "make-secrets.sh"), str(tmp_path)], check=True, capture_output=True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before
    for service in SERVICES.values():
        assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"])
        for key, value in service.get("environment", {}).items():
            assert not re.search("PASSWORD|TOKEN|SECRET", key) or str(value).startswith("/run/secrets/")


@pytest.mark.parametrize("name", OURS)
def test_commands_exist_in_the_command_line(name: str) -> None:
    service = OURS[name]
    command: Any = typer.main.get_command(app)
    words = ["student", "x", *service["command"]] if "entrypoint" in service else list(service["command"])
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known
    assert "/etc/exfm/exfm.yaml" in words


@pytest.mark.parametrize("name", OURS)
def test_the_example_settings_are_valid_in_every_container(name: str, tmp_path: Path) -> None:
    data = ROOT / "services" / "demo" / "kuairand"
    text = (DOCKER / "config" / "exfm.yaml").read_text().replace("/usr/share/exfm/kuairand", str(data))
    (tmp_path / "exfm.yaml").write_text(text)
    settings = load(tmp_path / "exfm.yaml", dockerfile_env() | OURS[name].get("environment", {}))
    schema = FeatureSchema.load(settings.schema_file)
    assert teacher_config(settings).name
    students = student_configs(settings)
    assert len(students) >= 2
    for student in students.values():
        student.check(schema)
    assert settings.replay is not None
    DatasetConfig.load(settings.replay.dataset, schema)
    assert settings.serve is not None
    assert settings.serve.is_loopback == (name != "serve")
    assert (settings.health.host, settings.health.port) == ("0.0.0.0", 9100)  # noqa: S104
    assert settings.run_dir == Path("/tmp/exfm" if name == "serve" else "/var/lib/exfm")  # noqa: S108
    writable = [v.split(":")[1] for v in OURS[name]["volumes"] if not v.endswith(":ro")] + ["/tmp"]  # noqa: S108
    assert name in JOBS or any(str(settings.run_dir).startswith(place) for place in writable)


def test_mounted_secrets_and_folders_are_the_ones_that_the_settings_name() -> None:
    text = (DOCKER / "config" / "exfm.yaml").read_text()
    named = set(re.findall(r"/run/secrets/(\w+)", text))
    assert named == {"redis_password", "serve_token"}
    assert all("redis_password" in OURS[name]["secrets"] for name in ("teacher", "student"))
    assert OURS["serve"]["secrets"] == ["serve_token"]
    assert "teacher:/var/lib/exfm:ro" in OURS["serve"]["volumes"]


def test_the_gpu_file_changes_the_teacher_only() -> None:
    override = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text())
    assert list(override["services"]) == ["teacher"]
    teacher = override["services"]["teacher"]
    assert teacher["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    args = set(re.findall(r"^ARG (\w+)", (DOCKER / "Dockerfile").read_text(), re.M))
    assert set(teacher["build"]["args"]) <= args


def queries() -> Iterator[str]:
    """Every expression of the dashboard and of the alerts."""
    board = json.loads((DOCKER / "grafana" / "dashboards" / "exfm.json").read_text())
    for panel in board["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))
    alerts = yaml.safe_load((DOCKER / "prometheus" / "alerts.yaml").read_text())
    for group in alerts["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


@pytest.mark.parametrize("query", sorted(set(queries())))
def test_dashboards_and_alerts_query_the_catalogue_only(query: str) -> None:
    names = set(re.findall(r"\bexfm_\w+", query))
    assert names or query == 'up{job="exfm"} == 0'
    labels: set[str] = set(SCRAPE_LABELS)
    for name in names:
        metric = CATALOGUE.get(name) or CATALOGUE[name.removesuffix("_bucket")]
        assert (metric.kind == "histogram") == name.endswith("_bucket")
        assert ("rate(" in query or "increase(" in query or "sum" in query) or metric.kind == "gauge"
        labels |= set(metric.labels)
        for label, word in re.findall(r'(\w+)="(\w+)"', query):
            allowed = metric.labels.get(label)
            assert allowed is None or word in allowed
    used = {word for part in re.findall(r"by \(([^)]*)\)", query) for word in part.split(", ")}
    assert used <= labels


def test_prometheus_scrapes_every_long_running_process_on_the_images_health_port() -> None:
    config = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yaml").read_text())
    (found,) = config["scrape_configs"][0]["dns_sd_configs"]
    assert set(found["names"]) == set(OURS) - JOBS
    assert str(found["port"]) == dockerfile_env()["EXFM_HEALTH__PORT"]


def test_the_image_runs_as_nobody_special_and_is_built_from_what_is_sent() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    assert re.findall(r"^USER (\S+)", text, re.M)[-1] == "10001:10001"
    assert "HEALTHCHECK" in text
    sent = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (?!--from)(.*)", text, re.M):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists()
            assert f"!{source}" in sent


@pytest.fixture
def guarded_redis(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A Redis started with the ACL of `make-secrets.sh`: its port, and the file of our password."""
    subprocess.run(["sh", str(DOCKER / "make-secrets.sh"), str(tmp_path)], check=True, capture_output=True)
    port = free_port()
    command = [redis_binary(), "--bind", "127.0.0.1", "--port", str(port), "--dir", str(tmp_path), "--save", ""]
    command += ["--aclfile", str(tmp_path / "redis_users.acl"), "--maxmemory-policy", "noeviction"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = Deadline.after(10)
    while True:
        try:
            redis.Redis(port=port, username="health", password="x", socket_timeout=1).ping()
            break
        except redis.ConnectionError:
            assert not deadline.passed
            time.sleep(0.05)
    yield port, tmp_path / "redis_password"
    server.kill()
    server.wait()


def test_the_acl_user_can_do_all_that_the_store_does_and_nothing_else(guarded_redis: tuple[int, Path]) -> None:
    port, password_file = guarded_redis
    options = yaml.safe_load((DOCKER / "config" / "exfm.yaml").read_text())["redis"]["options"]
    config = RedisConfig(url=f"redis://127.0.0.1:{port}/0", password_file=password_file, options=options)
    store = LogitStore(config, topic="examples", teacher="t", ttl_s=60)
    store.check()
    store.acquire(0)
    assert store.put(0, {0: b"block"}, 1).written == 1
    assert store.fetch(0, [0, 1]).blocks == [b"block", None]
    assert store.watermark(0) == 1
    store.close()
    client = redis.Redis(port=port, username="exfm", password=password_file.read_text())
    for command in (["FLUSHALL"], ["CONFIG", "GET", "*"], ["KEYS", "*"], ["ACL", "LIST"], ["SET", "other", "1"]):
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.execute_command(*command)
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(port=port).ping()
    with pytest.raises(redis.exceptions.NoPermissionError):
        redis.Redis(port=port, username="health", password="x").get("exfm:x")


def claim(tmp_path: Path) -> subprocess.Popen[bytes]:
    """Run claim_student.py with an `exfm` that prints its arguments and stays."""
    program = tmp_path / "bin" / "exfm"
    if not program.exists():
        program.parent.mkdir()
        program.write_text('#!/bin/sh\necho "$@"\nexec sleep 60\n')
        program.chmod(0o755)
    environ = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    command = [sys.executable, str(DOCKER / "claim_student.py"), "--settings", str(tmp_path / "exfm.yaml")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ)


def test_each_replica_claims_a_student_of_its_own_and_a_dead_ones_is_free_again(tmp_path: Path) -> None:
    students = [{"name": "one", "objectives": ["click"]}, {"name": "two", "objectives": ["click"]}]
    settings = {"run_dir": str(tmp_path / "run"), "schema_file": "schema.yaml", "students": students}
    (tmp_path / "exfm.yaml").write_text(yaml.safe_dump(settings))
    running = []
    try:
        for name in ("one", "two"):
            running.append(claim(tmp_path))
            assert running[-1].stdout is not None
            assert running[-1].stdout.readline().decode().split()[:2] == ["student", name]
        spare = claim(tmp_path)
        _, message = spare.communicate(timeout=30)
        assert spare.returncode == 3
        assert b"all 2 students run already" in message
        running[0].kill()
        running[0].wait()
        running.append(claim(tmp_path))
        assert running[-1].stdout is not None
        assert running[-1].stdout.readline().decode().split()[:2] == ["student", "one"]
    finally:
        for process in running:
            process.kill()
            process.communicate()


def test_the_health_check_follows_the_health_port() -> None:
    command = [sys.executable, str(DOCKER / "healthcheck.py")]
    health = HealthServer(HealthConfig(), CollectorRegistry(), lambda: False)
    health.start()
    environ = {**os.environ, "EXFM_HEALTH__PORT": health.address.rpartition(":")[2]}
    assert subprocess.run(command, env=environ, check=False, timeout=30).returncode == 0
    health.close()
    assert subprocess.run(command, env=environ, check=False, timeout=30, capture_output=True).returncode == 1

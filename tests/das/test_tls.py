"""TLS and users, as settings name them, against real servers: a Redis with an ACL, and a broker."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from tls_kit import Certificates, needs_openssl, tls_front

from das.broker import KafkaConfig, TopicsConfig, create_topics, wait_for_broker
from das.deadline import Deadline
from das.errors import Fatal, Retryable
from das.logit_store import LogitStore, PutResult, RedisConfig
from das.redis_check import check_server
from das.stream import KafkaSink, TopicPartition, read_tail
from services.embedded import HOST, broker_binary, free_port, redis_binary, start_broker

pytestmark = needs_openssl
PASSWORD = "correct-horse-battery"
COMMANDS = "+evalsha +script|load +get +set +pexpire +mget +time +info +ping +hello"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(params=["own TLS", "TLS in front"])
def address(request: pytest.FixtureRequest, certificates: Certificates, tmp_path: Path) -> Iterator[str]:
    """A Redis that only takes TLS with a client's certificate, and the user `exfm` with PASSWORD."""
    (tmp_path / "users.acl").write_text(
        f"user default off resetpass resetkeys -@all\nuser exfm on >{PASSWORD} ~exfm:* -@all {COMMANDS}\n"
    )
    if request.param == "TLS in front":
        with _redis(redis_binary(), tmp_path, []) as plain, tls_front(plain, certificates) as front:
            yield front
        return
    options = ["--tls-cert-file", certificates.server, "--tls-key-file", certificates.server_key]
    options += ["--tls-ca-cert-file", certificates.ca, "--tls-auth-clients", "yes"]
    for binary in filter(None, (shutil.which("redis-server"), shutil.which("valkey-server"))):
        with _redis(binary, tmp_path, [str(option) for option in options]) as own:
            if own:
                yield own
                return
    pytest.skip("no redis-server or valkey-server with TLS on PATH (Debian: apt-get install redis-server)")


class _redis:  # noqa: N801
    """A Redis with the ACL; its address is empty if it does not know the options."""

    def __init__(self, binary: str, folder: Path, tls: list[str]) -> None:
        port = free_port()
        ports = ["--port", "0", "--tls-port", str(port)] if tls else ["--port", str(port)]
        command = [binary, "--bind", HOST, "--dir", str(folder), "--save", "", "--appendonly", "yes", *ports, *tls]
        self._address = f"{HOST}:{port}"
        self._log = (folder / "redis.log").open("wb")
        self._process = subprocess.Popen(
            [*command, "--aclfile", str(folder / "users.acl")], stdout=self._log, stderr=self._log
        )

    def __enter__(self) -> str:
        host, _, port = self._address.rpartition(":")
        end_s = time.monotonic() + 10
        while self._process.poll() is None and time.monotonic() < end_s:
            try:
                redis.Redis(host, int(port), socket_timeout=1).ping()
            except redis.AuthenticationError:
                return self._address
            except redis.ConnectionError as error:
                if "reset" in str(error) or "closed" in str(error):  # it speaks, and wants TLS
                    return self._address
                time.sleep(0.05)
        return ""

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(10)
        self._log.close()


@pytest.fixture
def config(address: str, certificates: Certificates, tmp_path: Path) -> dict[str, Any]:
    """The settings that reach it."""
    (tmp_path / "password").write_text(f"{PASSWORD}\n")
    tls = {"ssl_certfile": certificates.client, "ssl_keyfile": certificates.client_key}
    return {
        "url": f"rediss://{address}/0",
        "password_file": tmp_path / "password",
        "socket_timeout_s": 2.0,
        "options": {"username": "exfm", "ssl_ca_certs": str(certificates.ca)} | {k: str(v) for k, v in tls.items()},
    }


def without(config: dict[str, Any], *options: str) -> RedisConfig:
    return RedisConfig.parse({**config, "options": {k: v for k, v in config["options"].items() if k not in options}})


def test_the_store_works_behind_tls_for_its_user_only(config: dict[str, Any], tmp_path: Path) -> None:
    right = RedisConfig.parse(config)
    store = LogitStore(right, topic="t", teacher="m", ttl_s=60)
    store.acquire(0)
    assert store.put(0, {0: b"block"}, 1, {0: b"embedding"}) == PutResult(1, 0, 0)
    assert store.fetch_pairs({0: [0]})[0] == (1, [b"block"], [b"embedding"])
    assert check_server(right) == []
    store.close()
    with pytest.raises(Retryable, match="certificate verify failed"):
        check_server(without(config, "ssl_ca_certs"))
    with pytest.raises(Retryable, match="is away"):
        check_server(without(config, "ssl_certfile", "ssl_keyfile"))
    with pytest.raises(Fatal, match="set username and password_file"):
        check_server(without(config, "username"))
    (tmp_path / "password").write_text("wrong")
    with pytest.raises(Fatal, match="set username and password_file") as error:
        check_server(right)
    assert "wrong" not in str(error.value).replace("WRONGPASS", "")
    with pytest.raises(Retryable, match="is away"):
        check_server(RedisConfig(url=right.url.replace("rediss:", "redis:"), socket_timeout_s=1.0))


def test_the_broker_is_reached_through_tls_by_its_options(certificates: Certificates, tmp_path: Path) -> None:
    front, options = f"{HOST}:{free_port()}", tmp_path / "options.yaml"
    server = start_broker(tmp_path, advertised=front)
    tls = {"security_protocol": "SSL", "ssl_cafile": str(certificates.ca), "ssl_certfile": str(certificates.client)}
    options.write_text(f"ssl_keyfile: {certificates.client_key}\n")
    topics = TopicsConfig(**{name: f"tls-{name}" for name in TopicsConfig.model_fields})
    config = KafkaConfig(bootstrap=front, topics=topics, options=tls, options_file=options, request_timeout_s=5)
    try:
        with tls_front(server.address, certificates, int(front.rpartition(":")[2])):
            create_topics(config)
            sink = KafkaSink(config)
            sink.send(topics.examples, 0, None, b"x")
            sink.flush(10)
            (record,) = read_tail(config, TopicPartition(topics.examples, 0), 1, Deadline.after(10))
            assert record.value == b"x"
            sink.close()
            stranger = config.model_copy(update={"options_file": None, "options": {"security_protocol": "SSL"}})
            with pytest.raises(Retryable, match="a refused user or certificate looks the same"):
                wait_for_broker(stranger, Deadline.after(1.5))
    finally:
        server.stop()


def test_sasl_options_reach_a_broker_that_asks_for_a_user(tmp_path: Path) -> None:
    """The embedded broker knows no user to let in, so that only the refusal can be shown."""
    address = f"tcp://{HOST}:{free_port()}"
    command = [broker_binary(), "broker", "--listener-url", address, "--advertised-listener-url", address]
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--storage-engine", "memory://tansu/", "--authentication"], stdout=file, stderr=file
        )
    secret = {"sasl_plain_username": "exfm", "sasl_plain_password": PASSWORD}
    config = KafkaConfig(bootstrap=address.removeprefix("tcp://"), options_file=tmp_path / "options.yaml")
    try:
        for mechanism, answer in (("PLAIN", "NoSharedMechanism"), (None, "NotAuthenticated")):
            sasl = {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": mechanism, **secret} if mechanism else {}
            (tmp_path / "options.yaml").write_text("\n".join(f"{key}: {value}" for key, value in sasl.items()))
            with pytest.raises(Retryable, match="a refused user or certificate looks the same") as error:
                wait_for_broker(config, Deadline.after(1.5))
            assert PASSWORD not in str(error.value)
            assert answer in log.read_text(errors="replace")
    finally:
        process.kill()
        process.wait()


def test_every_client_gets_the_options_and_none_of_ours_can_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text(f"sasl_plain_password: {PASSWORD}\n")
    given = {"security_protocol": "SASL_SSL", "sasl_mechanism": "SCRAM-SHA-512", "sasl_plain_username": "exfm"}
    config = KafkaConfig(options=given, options_file=tmp_path / "options.yaml")
    resolved = config.client_options({"client_id": "ours"})
    assert resolved.items() >= {**given, "sasl_plain_password": PASSWORD, "client_id": "ours"}.items()
    assert PASSWORD not in repr(config) + config.model_dump_json()
    (tmp_path / "options.yaml").write_text("acks: 0\n")
    with pytest.raises(ValueError, match="set by exfm itself"):
        config.client_options({})

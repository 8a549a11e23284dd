"""The Redis client: secrets stay out of logs, TLS and the user reach the server, wrong settings are refused early."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import redis

from das.errors import ConfigError, Fatal, Retryable
from das.logit_store import LogitStore, RedisConfig
from das.redis_client import OPTIONS, TLS_FILES, TLS_OPTIONS, connect
from services.embedded import HOST, Server


def _store(config: dict[str, object]) -> LogitStore:
    return LogitStore(RedisConfig.parse(config), topic="t", teacher="m", ttl_s=60)


def test_the_password_is_used_and_never_printed(own_redis: Server, admin: redis.Redis, tmp_path: Path) -> None:
    secret, file = "s3cret-word", tmp_path / "password"
    admin.config_set("requirepass", secret)
    file.write_text(secret + "\n")
    right = RedisConfig(url=f"redis://{own_redis.address}/0", password_file=file)
    assert secret not in repr(right)
    assert LogitStore(right, topic="t", teacher="m", ttl_s=1).put(0, {0: b"x"}, 1).written == 1
    file.write_text(secret[::-1])
    for config in (right, RedisConfig(url=f"redis://{own_redis.address}/0")):
        with pytest.raises(Fatal, match="set username and password_file") as error:
            LogitStore(config, topic="t", teacher="m", ttl_s=1).watermark(0)
        assert secret not in str(error.value)
        assert secret[::-1] not in str(error.value)


def test_a_missing_password_file_is_a_config_error(tmp_path: Path) -> None:
    config = RedisConfig(url="redis://127.0.0.1:1/0", password_file=tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"redis\.password_file"):
        LogitStore(config, topic="t", teacher="m", ttl_s=1).watermark(0)


@pytest.mark.parametrize(
    ("config", "fix"),
    [
        ({"url": "http://x"}, "start it with redis://"),
        ({"url": "redis://user:pw@x:1/0"}, "password_file"),
        ({"url": "redis://x/0?socket_timeout=900"}, "move what follows"),
        ({"options": {"retry_on_timeout": True}}, "cannot be set"),
        ({"url": "rediss://x", "options": {"ssl_password": "pw"}}, "cannot be set"),
        ({"options": {"ssl_ca_certs": "ca.pem"}}, "need a url that starts with rediss"),
        ({"socket_timeout_s": 0}, "greater than 0"),
    ],
)
def test_a_config_that_would_leak_or_hang_is_refused(config: dict[str, object], fix: str) -> None:
    with pytest.raises(ConfigError, match=fix) as error:
        RedisConfig.parse(config)
    assert "pw" not in str(error.value)


def test_every_known_option_is_one_that_the_client_takes(tmp_path: Path) -> None:
    file = tmp_path / "x.pem"
    file.touch()
    plain: dict[str, object] = {"username": "u", "db": 0, "client_name": "c", "protocol": 3, "health_check_interval": 5}
    tls = {"ssl_cert_reqs": "none", "ssl_check_hostname": False, "ssl_ciphers": "ALL"}
    tls |= dict.fromkeys(TLS_FILES, str(file))
    assert plain.keys() == OPTIONS
    assert tls.keys() == TLS_OPTIONS
    for url, options in ((f"redis://{HOST}:1", plain), (f"rediss://{HOST}:1", plain | tls)):
        connect(RedisConfig.parse({"url": url, "options": options})).connection_pool.make_connection()


def test_a_missing_certificate_is_a_config_error(tmp_path: Path) -> None:
    config = RedisConfig(url=f"rediss://{HOST}:1/0", options={"ssl_ca_certs": str(tmp_path / "absent.pem")})
    with pytest.raises(ConfigError, match=r"redis\.options\.ssl_ca_certs: no file"):
        LogitStore(config, topic="t", teacher="m", ttl_s=1).watermark(0)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command to make a certificate")
def test_a_store_behind_tls_is_reached_only_with_its_certificate(own_redis: Server, tmp_path: Path) -> None:
    key, cert = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*make.split(), "-keyout", key, "-out", cert], check=True, capture_output=True)
    with _tls_in_front_of(own_redis.address, key, cert) as address:
        config = {"url": f"rediss://{address}/0", "options": {"ssl_ca_certs": cert}}
        store = _store(config)
        assert store.put(0, {0: b"x"}, 1).written == 1
        store.close()
        stranger = _store(config | {"options": {}})
        with pytest.raises(Retryable, match="certificate verify failed"):
            stranger.watermark(0)


@contextmanager
def _tls_in_front_of(address: str, key: str, cert: str) -> Iterator[str]:
    """Terminates TLS for two connections, one after the other, in front of a plain server."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    host, _, port = address.rpartition(":")

    def serve() -> None:
        for _ in range(2):
            raw, _ = listener.accept()
            with (
                suppress(OSError),
                context.wrap_socket(raw, server_side=True) as client,
                socket.create_connection((host, int(port))) as backend,
            ):
                while request := client.recv(1 << 20):
                    backend.sendall(request)
                    client.sendall(backend.recv(1 << 20))

    with socket.create_server((HOST, 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"{HOST}:{listener.getsockname()[1]}"
        thread.join(10)

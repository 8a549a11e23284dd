"""What the API does to clients that are too many, too big, too slow or unknown; health answers meanwhile."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve_kit import Running, make_model, make_rows, publish, serving

from das.errors import ConfigError
from services.serve import ServeConfig
from services.serve.config import load_tokens

TOKEN = "0123456789abcdef-one"
OTHER = "0123456789abcdef-two"
MAX_BODY = 20_000
MORE_THAN_SOCKETS_HOLD = 64 << 20


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("snapshots")
    publish(root, 1, make_model(1))
    return root


@pytest.fixture(scope="module")
def server(snapshots: Path) -> Iterator[Running]:
    with serving(snapshots, max_body_bytes=MAX_BODY, max_concurrent=1, deadline_s=1.0) as running:
        yield running


def body_of(size: int) -> bytes:
    """A valid request of exactly `size` bytes."""
    return json.dumps({"rows": make_rows(1)}).encode().ljust(size)


def raw_request(server: Running, headers: str, body: bytes, *, close: bool = False) -> bytes:
    """Send exactly these bytes and return what comes back until the server closes or goes silent."""
    with socket.create_connection(("127.0.0.1", server.config.port), timeout=5) as connection:
        connection.sendall(f"POST /v1/score HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode() + body)
        if close:
            return b""
        connection.settimeout(3)
        received = b""
        try:
            while chunk := connection.recv(65_536):
                received += chunk
                if b"\r\n\r\n" in received and b'"}' in received:
                    break
        except TimeoutError:
            pass
        return received


def test_a_body_at_the_limit_is_read_and_one_byte_more_is_413(server: Running) -> None:
    post = server.client.post
    headers = {"content-type": "application/json"}
    assert post("/v1/score", content=body_of(MAX_BODY), headers=headers).status_code == 200
    answer = post("/v1/score", content=body_of(MAX_BODY + 1), headers=headers)
    assert answer.status_code == 413
    assert str(MAX_BODY) in answer.json()["error"]


def test_a_body_without_a_length_is_counted_as_it_comes(server: Running) -> None:
    def chunks(total: int) -> Iterator[bytes]:
        body = body_of(total)
        yield from (body[i : i + 1000] for i in range(0, total, 1000))

    assert server.client.post("/v1/score", content=chunks(MAX_BODY)).status_code == 200
    assert server.client.post("/v1/score", content=chunks(MAX_BODY + 1)).status_code == 413


def test_an_endless_body_is_cut_off(server: Running) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < MORE_THAN_SOCKETS_HOLD:
            sent += 10_000
            yield b" " * 10_000

    with contextlib.suppress(httpx.TransportError):  # when the server closes while we are still sending
        assert server.client.post("/v1/score", content=endless()).status_code == 413
    assert sent < MORE_THAN_SOCKETS_HOLD
    assert server.client.post("/v1/score", content=body_of(1000)).status_code == 200


@pytest.mark.parametrize(
    ("length", "body", "codes"),
    [
        (MAX_BODY * 1000, b"{}", {b"413"}),  # far too long, hardly sent: refused before it comes
        (10, body_of(1000), {b"422"}),  # shorter than what is sent: only the declared bytes are read
        (500, b"{", {b"408"}),  # longer than what is sent: waits no longer than the deadline
        (-5, b"{}", {b"400"}),
    ],
)
def test_a_lying_length_gets_an_answer_within_the_deadline(
    server: Running, length: int, body: bytes, codes: set[bytes]
) -> None:
    started = time.monotonic()
    received = raw_request(server, f"Content-Type: application/json\r\nContent-Length: {length}\r\n", body)
    assert received.split(b" ")[1] in codes
    assert time.monotonic() - started < 2.5
    assert server.client.post("/v1/score", content=body_of(1000)).status_code == 200


def test_a_client_that_leaves_mid_body_frees_its_slot(server: Running) -> None:
    for _ in range(3):
        raw_request(server, "Content-Length: 500\r\n", b"{", close=True)
    server.wait_for(lambda: server.client.post("/v1/score", content=body_of(1000)).status_code == 200, 2)


def test_when_full_503_with_retry_after_and_health_still_answers(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.config.port)) as slow:
        slow.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{")
        time.sleep(0.1)
        answer = server.client.post("/v1/score", content=body_of(1000))
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        started = time.monotonic()
        assert server.client.get("/v2/health/live").status_code == 200
        assert server.client.get("/v2/health/ready").status_code == 200
        assert server.client.get("/metrics").status_code == 200
        assert time.monotonic() - started < 0.5


def test_an_answer_that_is_late_is_503_while_health_answers(snapshots: Path) -> None:
    body = json.dumps({"rows": make_rows(100) * 200}).encode()
    limits = {"max_rows": 65_536, "max_body_bytes": len(body), "deadline_s": 0.15}
    with serving(snapshots, **limits) as server:
        answers: list[httpx.Response] = []
        late = threading.Thread(target=lambda: answers.append(httpx.post(f"{server.url}/v1/score", content=body)))
        late.start()
        slowest = 0.0
        while late.is_alive():
            started = time.monotonic()
            assert server.client.get("/v2/health/live").status_code == 200
            slowest = max(slowest, time.monotonic() - started)
        late.join()
        assert answers[0].status_code == 503
        assert "retry-after" in answers[0].headers
        assert slowest < 1.0
        server.wait_for(lambda: server.client.post("/v1/score", content=body_of(1000)).status_code == 200)


def test_before_a_snapshot_everything_but_liveness_is_503(tmp_path: Path) -> None:
    with serving(tmp_path / "later", ready=False) as server:
        for method, path in (("GET", "/v2/health/ready"), ("GET", "/v2/models/teacher/ready"), ("POST", "/v1/score")):
            answer = server.client.request(method, path, content=body_of(1000) if method == "POST" else None)
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
        assert server.client.get("/v2/health/live").status_code == 200
        assert server.client.get("/v2/models/teacher").json()["versions"] == []
        assert not server.ready.is_set()
        publish(tmp_path / "later", 1, make_model(1))
        assert server.ready.wait(5)
        assert server.client.post("/v1/score", content=body_of(1000)).status_code == 200


@pytest.fixture(scope="module")
def guarded(snapshots: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    token_file = tmp_path_factory.mktemp("secrets") / "token"
    token_file.write_text(f"{TOKEN}\n\n{OTHER}\n")
    with serving(snapshots, token_file=str(token_file)) as running:
        yield running


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}"]
)
@pytest.mark.parametrize(
    "path", ["/v1/score", "/v2/models/teacher/infer", "/v2/models/teacher", "/metrics", "/nothing"]
)
def test_without_the_token_only_health_answers(guarded: Running, header: str | None, path: str) -> None:
    headers = {} if header is None else {"authorization": header}
    answer = guarded.client.request("POST" if path.endswith(("score", "infer")) else "GET", path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert guarded.client.get("/v2/health/ready", headers=headers).status_code == 200


@pytest.mark.parametrize("token", [TOKEN, OTHER])
def test_each_token_of_the_file_is_accepted(guarded: Running, token: str) -> None:
    headers = {"authorization": f"Bearer {token}"}
    assert guarded.client.post("/v1/score", content=body_of(1000), headers=headers).status_code == 200
    assert guarded.client.get("/metrics", headers=headers).status_code == 200


def test_an_unknown_client_cannot_take_a_slot_or_send_a_body(guarded: Running) -> None:
    received = raw_request(guarded, "Content-Length: 500\r\n", b"{")
    assert received.split(b" ")[1] == b"401"


def test_tokens_appear_in_no_page_and_no_dump(guarded: Running) -> None:
    headers = {"authorization": f"Bearer {TOKEN}"}
    for path in ("/metrics", "/openapi.json", "/v2", "/v2/models/teacher"):
        assert TOKEN not in guarded.client.get(path, headers=headers).text
    config = ServeConfig.parse({"token": TOKEN})
    assert TOKEN not in repr(config) + config.model_dump_json()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org", ""])  # noqa: S104
def test_beyond_loopback_a_token_is_required(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a bearer token"):
        load_tokens(ServeConfig.parse({"host": host}))
    (tmp_path / "token").write_text(TOKEN)
    assert load_tokens(ServeConfig.parse({"host": host, "token_file": str(tmp_path / "token")})) == (TOKEN.encode(),)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_on_loopback_a_token_is_optional(host: str) -> None:
    assert load_tokens(ServeConfig.parse({"host": host})) == ()


@pytest.mark.parametrize("text", ["", "short", "\n \n"])
def test_an_empty_or_short_token_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(text)
    with pytest.raises(ConfigError, match="token_file"):
        load_tokens(ServeConfig.parse({"token_file": str(tmp_path / "token")}))


def test_a_taken_port_is_named(server: Running, snapshots: Path) -> None:
    second = Running(snapshots)
    args: tuple[Any, ...] = (server.config, *second.thread._args[1:])  # type: ignore[attr-defined]
    second.client.close()
    from services.serve.server import run_server

    with pytest.raises(ConfigError, match=str(server.config.port)):
        run_server(*args)

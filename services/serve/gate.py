"""What every request passes before the application sees it: token, limits, deadline, metrics.

The gate reads the whole body itself, counting bytes as they come, so that neither a missing nor a lying
content-length gets past the limit. Health answers whatever the load and without a token: it says up or down only.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from das.deadline import Deadline
from das.telemetry import Telemetry
from services.serve.config import ServeConfig

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/v2/health/live", "/v2/health/ready"})
FIXED_PATHS = OPEN_PATHS | {"/v1/score", "/v2", "/metrics", "/openapi.json"}
RETRY_AFTER_S = 1
DRAIN_S = 1.0
DRAIN_FACTOR = 4


class Refused(Exception):
    """The request ends here with this status and message."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers or {}


def unavailable(message: str) -> Refused:
    """503 with Retry-After: the same request may succeed shortly."""
    return Refused(503, message, {"retry-after": str(RETRY_AFTER_S)})


class ClientGone(Exception):
    """The client closed the connection before its request was whole."""


def path_label(path: str) -> str:
    """A bounded metric label for a request path."""
    if path in FIXED_PATHS:
        return path
    if path.startswith("/v2/models/"):
        return "/v2/models/{name}/infer" if path.endswith("/infer") else "/v2/models/{name}"
    return "other"


class Gate:
    """ASGI middleware in front of the API."""

    def __init__(self, app: App, config: ServeConfig, tokens: tuple[bytes, ...], telemetry: Telemetry) -> None:
        self._app = app
        self._config = config
        self._tokens = tokens
        self._telemetry = telemetry
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Admit or refuse one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        await self._count(scope, receive, send)

    async def _count(self, scope: Scope, receive: Receive, send: Send) -> None:
        started_s = time.monotonic()
        status = 499  # the client went away before an answer

        async def counting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._admit(scope, receive, counting_send)
        except ClientGone:
            return
        except Refused as refused:
            await respond(counting_send, refused)
        finally:
            label = path_label(scope["path"])
            self._telemetry.count("exfm_http_requests_total", path=label, code=str(status))
            self._telemetry.observe("exfm_http_seconds", time.monotonic() - started_s, path=label)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if scope["path"] not in OPEN_PATHS:
            self._authorize(headers.get(b"authorization", b""))
        deadline = Deadline.after(self._config.deadline_s)
        scope.setdefault("state", {})["deadline"] = deadline
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._in_flight >= self._config.max_concurrent:
            raise unavailable(f"{self._config.max_concurrent} requests are under way already; try again")
        self._in_flight += 1
        try:
            body = await self._read_body(headers, receive, deadline)
            await self._app(scope, replay(body, receive), send)
        finally:
            self._in_flight -= 1

    def _authorize(self, header: bytes) -> None:
        """Compare with every token in constant time; raises Refused."""
        if not self._tokens:
            return
        scheme, _, given = header.partition(b" ")
        matches = [hmac.compare_digest(given.strip(), token) for token in self._tokens]
        if scheme.lower() != b"bearer" or not any(matches):
            raise Refused(401, "a valid bearer token is needed", {"www-authenticate": "Bearer"})

    async def _read_body(self, headers: dict[bytes, bytes], receive: Receive, deadline: Deadline) -> bytes:
        """The whole body; raises Refused past the size or time limit, ClientGone on a cut connection."""
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise Refused(415, "content-encoding is not supported; send the JSON uncompressed")
        kind = headers.get(b"content-type", b"application/json").split(b";")[0].strip().lower()
        if kind != b"application/json":
            raise Refused(415, "content-type must be application/json")
        limit = self._config.max_body_bytes
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            await self._too_large(receive)
        chunks, size = [], 0
        async for chunk in body_chunks(receive, deadline):
            size += len(chunk)
            if size > limit:
                await self._too_large(receive)
            chunks.append(chunk)
        return b"".join(chunks)

    async def _too_large(self, receive: Receive) -> None:
        """Discard a little more, so that a client that sends first still reads the answer; raises Refused."""
        left = DRAIN_FACTOR * self._config.max_body_bytes
        try:
            async for chunk in body_chunks(receive, Deadline.after(DRAIN_S)):
                left -= len(chunk)
                if left < 0:
                    break
        except Refused:
            pass  # still sending after DRAIN_S: answer anyway
        message = f"the body is over {self._config.max_body_bytes} bytes; send fewer rows a request"
        raise Refused(413, message, {"connection": "close"})


async def body_chunks(receive: Receive, deadline: Deadline) -> Any:
    """Yield the body as it comes; raises Refused(408) when the deadline passes, ClientGone on disconnect."""
    more = True
    while more:
        try:
            message = await asyncio.wait_for(receive(), deadline.left_s)
        except TimeoutError:
            raise Refused(408, "the body did not come in time", {"connection": "close"}) from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        more = message.get("more_body", False)
        yield message.get("body", b"")


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `body` once and then waits for the disconnect."""
    given = False

    async def receive_again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


async def respond(send: Send, refused: Refused) -> None:
    """Send a refusal as `{"error": message}`."""
    body = msgspec.json.encode({"error": refused.message})
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refused.headers}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})

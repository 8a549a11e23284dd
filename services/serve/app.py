"""The HTTP API of the teacher: `/v1/score`, the Open Inference Protocol v2, metrics and the OpenAPI document."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from das.messages import MessageCodec
from services.logs import get_logger
from services.metrics import PrometheusTelemetry
from services.serve.document import describe
from services.serve.gate import Refused, unavailable
from services.serve.scoring import MODEL_NAME, Scorer
from services.serve.tensors import input_tensors, output_tensors

logger = get_logger(__name__)


def create_app(
    scorer: Scorer, codec: MessageCodec, telemetry: PrometheusTelemetry, is_ready: Callable[[], bool], version: str
) -> FastAPI:
    """The application behind the gate. `is_ready` says whether a request now would be scored."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    document = describe(codec, version)

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return json_response(document)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(telemetry.registry), media_type=CONTENT_TYPE_LATEST)

    @app.post("/v1/score")
    async def score(request: Request) -> Response:
        return await _scored(scorer, scorer.score, request)

    _add_server_routes(app, is_ready, version)
    _add_model_routes(app, scorer, is_ready)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _crashed)
    return app


def _add_server_routes(app: FastAPI, is_ready: Callable[[], bool], version: str) -> None:
    @app.get("/v2")
    async def server() -> Response:
        return json_response({"name": "exfm", "version": version, "extensions": []})

    @app.get("/v2/health/live")
    async def live() -> Response:
        return json_response({"live": True})

    @app.get("/v2/health/ready")
    async def ready() -> Response:
        if not is_ready():
            raise unavailable("not ready: no teacher snapshot is loaded, or the server is stopping")
        return json_response({"ready": True})


def _add_model_routes(app: FastAPI, scorer: Scorer, is_ready: Callable[[], bool]) -> None:
    base, versioned = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"

    @app.get(versioned)
    @app.get(base)
    async def model(name: str, version: str | None = None) -> Response:
        _check_model(scorer, name, version)
        metadata: dict[str, Any] = {"name": MODEL_NAME, "versions": [], "platform": "pytorch"}
        if scorer.slot.current is not None:
            metadata["versions"] = [str(scorer.slot.current.version)]
        metadata["inputs"] = input_tensors(scorer.schema)
        metadata["outputs"] = output_tensors(scorer.schema)
        return json_response(metadata)

    @app.get(versioned + "/ready")
    @app.get(base + "/ready")
    async def model_ready(name: str, version: str | None = None) -> Response:
        _check_model(scorer, name, version)
        if not is_ready():
            raise unavailable("not ready: no teacher snapshot is loaded, or the server is stopping")
        return json_response({"name": MODEL_NAME, "ready": True})

    @app.post(versioned + "/infer")
    @app.post(base + "/infer")
    async def infer(request: Request, name: str, version: str | None = None) -> Response:
        _check_model(scorer, name, version)
        return await _scored(scorer, scorer.infer, request)


def _check_model(scorer: Scorer, name: str, version: str | None) -> None:
    """Only the loaded teacher exists; a name or version from the URL never becomes a path. Raises Refused (404)."""
    current = scorer.slot.current
    if name != MODEL_NAME:
        raise Refused(404, f"no such model; this server has '{MODEL_NAME}'")
    if version is not None and (current is None or version != str(current.version)):
        raise Refused(404, "this version is not loaded; GET /v2/models/teacher lists the one that is")


async def _scored(scorer: Scorer, answer: Callable[[bytes], bytes], request: Request) -> Response:
    scorer.teacher()
    body = await scorer.run(answer, await request.body(), request.state.deadline)
    return Response(body, media_type="application/json")


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """`content` as a JSON response."""
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return json_response({"error": error.message}, error.status, error.headers)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return json_response({"error": str(error.detail)}, error.status_code, dict(error.headers or {}))


async def _crashed(request: Request, error: Exception) -> Response:
    logger.error("request failed", path=request.url.path, exc_info=error)
    return json_response({"error": "internal error; the server's log has the details"}, 500)

"""The OpenAPI document, made from the feature schema through the codec that validates the requests."""

from __future__ import annotations

from typing import Any

import msgspec

from das.messages import MessageCodec
from services.serve.rows import body_type, example_row
from services.serve.tensors import InferRequest, input_tensors

REF = "#/components/schemas/{name}"
REFUSALS = {
    401: "no valid bearer token (only where one is configured)",
    408: "the body did not come in time",
    413: "the body or the number of rows is over its limit",
    415: "not JSON, or compressed",
    422: "a row does not fit the feature schema; the message names the row and the field",
    503: "no snapshot loaded, all slots taken, or the answer was late; see Retry-After",
}


class RowScore(msgspec.Struct):
    """One row's scores by objective."""

    logits: dict[str, float]
    probabilities: dict[str, float]


class ScoreResponse(msgspec.Struct):
    """Scores in the order of the rows; `trained_through` is in milliseconds since the epoch."""

    teacher_version: int
    trained_through: int
    results: list[RowScore]


class OutputTensor(msgspec.Struct):
    """One value per row."""

    name: str
    datatype: str
    shape: list[int]
    data: list[float]


class InferResponse(msgspec.Struct):
    """The Open Inference Protocol's answer."""

    model_name: str
    model_version: str
    outputs: list[OutputTensor]
    id: str | None = None
    parameters: dict[str, int] = {}


class Error(msgspec.Struct):
    """Why a request was refused."""

    error: str


def describe(codec: MessageCodec, version: str) -> dict[str, Any]:
    """The document as JSON data."""
    types = [body_type(codec), ScoreResponse, InferRequest, InferResponse, Error]
    refs, components = msgspec.json.schema_components(types, ref_template=REF)
    request, scored, infer_request, inferred, error = refs
    example = {"rows": [example_row(codec)]}
    score = _scoring("Score rows", request, example, scored, codec, error)
    infer = _scoring("Score tensors", infer_request, example_tensors(codec), inferred, codec, error)
    paths: dict[str, Any] = {"/v1/score": {"post": score}}
    for base in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        responses = {**infer["responses"], "404": _error(error, "no such model or version")}
        paths[base] = {"get": _plain("Metadata of the teacher", error, base)}
        paths[base + "/ready"] = {"get": _plain("Whether the teacher is loaded", error, base, 503)}
        paths[base + "/infer"] = {"post": infer | {"parameters": _parameters(base), "responses": responses}}
    paths["/v2"] = {"get": _plain("Name and version of the server", error)}
    paths["/v2/health/live"] = {"get": _plain("Whether the process answers", error, security=False)}
    paths["/v2/health/ready"] = {"get": _plain("Whether a request would be scored", error, "", 503, security=False)}
    paths["/metrics"] = {"get": _plain("Prometheus metrics", error, media="text/plain")}
    paths["/openapi.json"] = {"get": _plain("This document", error)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "exfm teacher", "version": version, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"bearer": []}, {}],
    }


def example_tensors(codec: MessageCodec) -> dict[str, Any]:
    """The example row as an `infer` request."""
    row = example_row(codec)
    values: dict[str, Any] = {"domain": row["domain"], "event_time": row["event_time"]}
    for name, value in row["features"].items():
        values |= {f"{name}.{f}": ids for f, ids in value.items()} if isinstance(value, dict) else {name: value}
    inputs = []
    for tensor in input_tensors(codec.schema):
        if tensor["name"] not in values:
            continue
        value = values[tensor["name"]]
        shape = [1, len(value)] if isinstance(value, list) else [1]
        data = value if isinstance(value, list) else [value]
        inputs.append({"name": tensor["name"], "datatype": tensor["datatype"], "shape": shape, "data": data})
    return {"id": "42", "inputs": inputs}


def _error(schema: Any, meaning: str) -> dict[str, Any]:
    return {"description": meaning, "content": {"application/json": {"schema": schema}}}


def _scoring(summary: str, request: Any, example: Any, answer: Any, codec: MessageCodec, error: Any) -> dict[str, Any]:
    body = {"schema": request, "examples": {codec.schema.name: {"value": example}}}
    success = {"description": "scores", "content": {"application/json": {"schema": answer}}}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": body}},
        "responses": {"200": success, **{str(code): _error(error, text) for code, text in REFUSALS.items()}},
    }


def _plain(
    summary: str, error: Any, path: str = "", *codes: int, media: str = "application/json", security: bool = True
) -> dict[str, Any]:
    """An operation without a body."""
    content = {media: {"schema": {"type": "object"} if media == "application/json" else {"type": "string"}}}
    responses = {"200": {"description": "yes" if codes else "the answer", "content": content}}
    codes = (*codes, 401) if security else codes
    codes = (*codes, 404) if path else codes
    for code in codes:
        responses[str(code)] = _error(error, REFUSALS.get(code, "no such model or version"))
    operation: dict[str, Any] = {"summary": summary, "responses": responses, "parameters": _parameters(path)}
    return operation if security else operation | {"security": []}


def _parameters(path: str) -> list[dict[str, Any]]:
    names = [name for name in ("name", "version") if f"{{{name}}}" in path]
    examples = {"name": "teacher", "version": "1"}
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}, "example": examples[name]}
        for name in names
    ]

"""The HTTP API: scores equal the snapshot's own model; the Open Inference Protocol; what is refused, and how."""

from __future__ import annotations

import copy
import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve_kit import (
    CODEC,
    SCHEMA,
    TRAINED_THROUGH_MS,
    Running,
    expected_logits,
    make_model,
    make_rows,
    publish,
    serving,
)

from das.schema import FeatureSchema
from foundation_model.kunlun import Kunlun
from services.serve.document import example_tensors
from services.serve.tensors import input_tensors, output_tensors

VERSION = 7


@pytest.fixture(scope="module")
def model() -> Kunlun:
    return make_model(1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model: Kunlun) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("snapshots")
    publish(root, VERSION, model)
    with serving(root, max_rows=64) as running:
        yield running


def score(server: Running, rows: Any) -> httpx.Response:
    return server.client.post("/v1/score", json={"rows": rows})


def test_scores_equal_the_snapshot_models_logits(server: Running, model: Kunlun) -> None:
    rows = make_rows(37)
    answer = score(server, rows)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["teacher_version"], body["trained_through"]) == (VERSION, TRAINED_THROUGH_MS + VERSION)
    logits = np.array([[r["logits"][name] for name in SCHEMA.objective_names] for r in body["results"]], np.float32)
    np.testing.assert_array_equal(logits, expected_logits(model, rows))
    probabilities = np.array([[r["probabilities"][n] for n in SCHEMA.objective_names] for r in body["results"]])
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-logits.astype(np.float64))), rtol=1e-6)
    assert logits.std() > 0.01


def test_under_zipper_only_full_windows_are_served(tmp_path: Path) -> None:
    windows = [{"window_s": 5, "share": 0.5}, {"window_s": 10, "share": 0.5}]
    schema = FeatureSchema.parse(SCHEMA.model_dump(mode="json") | {"zipper": {"salt": "s", "windows": windows}})
    zipped, rows = make_model(2, schema), make_rows(5)
    publish(tmp_path, VERSION, zipped, schema)
    with serving(tmp_path, schema=schema) as server:
        results = score(server, rows).json()["results"]
        outputs = server.client.get("/v2/models/teacher").json()["outputs"]
    expected_BK = expected_logits(zipped, rows)
    assert [head.name for head in schema.heads] == ["click@5000ms", "click", "like@5000ms", "like"]
    for k, name in ((1, "click"), (3, "like")):
        np.testing.assert_array_equal([r["logits"][name] for r in results], expected_BK[:, k].tolist())
    assert {name for r in results for name in r["logits"]} == set(SCHEMA.objective_names)
    assert {o["name"] for o in outputs} == {
        f"{kind}.{n}" for kind in ("logit", "probability") for n in ("click", "like")
    }


def test_a_row_scores_the_same_alone_and_in_a_batch(server: Running) -> None:
    rows = make_rows(8)
    together = [r["logits"]["click"] for r in score(server, rows).json()["results"]]
    alone = [score(server, [row]).json()["results"][0]["logits"]["click"] for row in rows]
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


def test_event_time_defaults_to_now(server: Running) -> None:
    row = make_rows(5)[1]
    del row["event_time"]
    assert score(server, [row]).status_code == 200


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda row: row.update(domain="9"), "domain '9'"),
        (lambda row: row["features"].pop("user_id"), "user_id"),
        (lambda row: row["features"].update(user_id="712"), "features.user_id"),
        (lambda row: row["features"].update(user_id=None), "features.user_id"),
        (lambda row: row["features"].update(color="red"), "color"),
        (lambda row: row["features"].update(price="NaN"), "features.price"),
        (lambda row: row["features"].update(price=1e300), "features.price"),
        (lambda row: row["features"]["clicks"]["time_ms"].append(1), "clicks"),
        (lambda row: row["features"].update(clicks={"item_id": [1], "past_tag": ["a"], "time_ms": [2**42]}), "later"),
        (lambda row: row.update(surprise=1), "surprise"),
        (lambda row: row.update(event_time=-1), "event_time"),
    ],
)
def test_a_row_outside_the_schema_is_422_and_names_row_and_field(server: Running, change: Any, named: str) -> None:
    rows = make_rows(3)
    change(rows[2])
    answer = score(server, rows)
    assert answer.status_code == 422
    assert answer.json()["error"].startswith("rows[2]: ")
    assert named in answer.json()["error"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"rows": 3}', b"\xff\xfe", b'{"rows": [], "x": 1}', b"[" * 50_000]
)
def test_a_malformed_body_is_422(server: Running, body: bytes) -> None:
    for path in ("/v1/score", "/v2/models/teacher/infer"):
        answer = server.client.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 422
        assert answer.json()["error"]


def test_no_rows_is_422_and_too_many_413(server: Running) -> None:
    assert score(server, []).status_code == 422
    rows = make_rows(1) * 65
    assert score(server, rows).status_code == 413
    assert infer(server, as_tensors(rows)).status_code == 413
    assert score(server, rows[:64]).status_code == 200


@pytest.mark.parametrize(
    "headers", [{"content-type": "text/plain"}, {"content-type": "application/json", "content-encoding": "gzip"}]
)
def test_other_content_is_415(server: Running, headers: dict[str, str]) -> None:
    body = json.dumps({"rows": make_rows(1)}).encode()
    assert server.client.post("/v1/score", content=body, headers=headers).status_code == 415


def as_tensors(rows: list[dict[str, Any]], *, nested: bool = False) -> list[dict[str, Any]]:
    """The rows as an Open Inference Protocol client sends them: one input per feature, histories padded."""
    features = [row["features"] for row in rows]
    width = max(len(f["clicks"]["time_ms"]) for f in features)
    columns: dict[str, tuple[str, list[Any]]] = {
        "domain": ("BYTES", [row["domain"] for row in rows]),
        "event_time": ("INT64", [row["event_time"] for row in rows]),
        "user_id": ("INT64", [f["user_id"] for f in features]),
        "tag": ("BYTES", [f.get("tag") for f in features]),
        "price": ("FP32", [f.get("price") for f in features]),
        "clicks.length": ("INT64", [len(f["clicks"]["time_ms"]) for f in features]),
    }
    inputs = [{"name": n, "datatype": t, "shape": [len(rows)], "data": d} for n, (t, d) in columns.items()]
    for field, datatype, pad in (("item_id", "INT64", -1), ("past_tag", "BYTES", ""), ("time_ms", "INT64", 0)):
        padded = [f["clicks"][field] + [pad] * (width - len(f["clicks"][field])) for f in features]
        data = padded if nested else [value for row in padded for value in row]
        inputs.append({"name": f"clicks.{field}", "datatype": datatype, "shape": [len(rows), width], "data": data})
    return inputs


def infer(
    server: Running, inputs: list[dict[str, Any]], path: str = "/v2/models/teacher", **more: Any
) -> httpx.Response:
    return server.client.post(f"{path}/infer", json={"inputs": inputs, **more})


@pytest.mark.parametrize("nested", [False, True])
def test_infer_gives_the_same_logits_as_score(server: Running, model: Kunlun, nested: bool) -> None:
    rows = make_rows(13, seed=3)
    answer = infer(server, as_tensors(rows, nested=nested), id="a-1")
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["model_name"], body["model_version"], body["id"]) == ("teacher", str(VERSION), "a-1")
    outputs = {output["name"]: output for output in body["outputs"]}
    assert list(outputs) == [tensor["name"] for tensor in output_tensors(SCHEMA)]
    for k, name in enumerate(SCHEMA.objective_names):
        logit = outputs[f"logit.{name}"]
        assert (logit["datatype"], logit["shape"]) == ("FP32", [13])
        np.testing.assert_array_equal(np.array(logit["data"], np.float32), expected_logits(model, rows)[:, k])


def test_infer_answers_the_outputs_and_the_version_asked_for(server: Running) -> None:
    inputs = as_tensors(make_rows(2))
    wanted = [{"name": "probability.like"}]
    answer = infer(server, inputs, f"/v2/models/teacher/versions/{VERSION}", outputs=wanted)
    assert [output["name"] for output in answer.json()["outputs"]] == ["probability.like"]
    assert "id" not in answer.json()
    assert infer(server, inputs, "/v2/models/teacher/versions/8").status_code == 404
    assert infer(server, inputs, outputs=[{"name": "logit.nope"}]).status_code == 422


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda inputs: inputs.clear(), "inputs"),
        (lambda inputs: inputs[2].update(datatype="BYTES"), "user_id: datatype"),
        (lambda inputs: inputs[2].update(shape=[3]), "user_id: shape"),
        (lambda inputs: inputs[2].update(shape=[2, 3]), "user_id: shape"),
        (lambda inputs: inputs[2]["data"].append(3), "user_id: 3 values"),
        (lambda inputs: inputs[2].update(name="user"), "'user'"),
        (lambda inputs: inputs.append(inputs[0]), "twice"),
        (lambda inputs: inputs.pop(2), "user_id"),
        (lambda inputs: inputs[5].update(data=[9, 0]), "clicks.length"),
        (lambda inputs: inputs[5].update(data=[None, 0]), "clicks.length"),
        (lambda inputs: inputs[0].update(shape=[2**62]), "rows"),
    ],
)
def test_a_tensor_outside_the_schema_is_refused_by_name(server: Running, change: Any, named: str) -> None:
    inputs = as_tensors(make_rows(2))
    change(inputs)
    answer = infer(server, inputs)
    assert answer.status_code in (413, 422)
    assert named in answer.json()["error"]


def test_the_protocols_metadata_and_health(server: Running) -> None:
    get = server.client.get
    assert get("/v2").json()["name"] == "exfm"
    assert get("/v2/health/live").json() == {"live": True}
    assert get("/v2/health/ready").json() == {"ready": True}
    metadata = get("/v2/models/teacher").json()
    assert metadata["versions"] == [str(VERSION)]
    assert metadata["inputs"] == input_tensors(SCHEMA)
    assert {t["name"] for t in metadata["inputs"]} >= {"domain", "user_id", "price", "clicks.item_id", "clicks.time_ms"}
    assert get("/v2/models/teacher/ready").json() == {"name": "teacher", "ready": True}
    assert get(f"/v2/models/teacher/versions/{VERSION}/ready").status_code == 200


@pytest.mark.parametrize(
    "name", ["other", "..", "%2e%2e", "..%2f..%2fetc%2fpasswd", "teacher%2f..%2f..", "teacher%00", "~", "C:%5Cx"]
)
def test_a_model_name_never_becomes_a_path(server: Running, name: str) -> None:
    for tail in ("", "/ready", "/versions/..%2f7", "/versions/07"):
        connection = http.client.HTTPConnection("127.0.0.1", server.config.port, timeout=5)  # httpx resolves the dots
        connection.request("GET", f"/v2/models/{name}{tail}")
        answer = connection.getresponse()
        assert answer.status == 404
        assert "error" in json.loads(answer.read())
        connection.close()


def test_unknown_paths_and_methods_are_refused_and_share_one_metric_label(server: Running) -> None:
    before = server.metric("exfm_http_requests_total", path="other", code="404")
    for number in range(3):
        assert server.client.get(f"/nothing/{number}").status_code == 404
    assert server.client.get("/v1/score").status_code == 405
    assert server.metric("exfm_http_requests_total", path="other", code="404") == before + 3


def test_metrics_count_requests_and_name_the_version(server: Running) -> None:
    before = server.metric("exfm_http_requests_total", path="/v1/score", code="200")
    score(server, make_rows(1))
    text = server.client.get("/metrics").text
    assert f'exfm_http_requests_total{{code="200",path="/v1/score"}} {before + 1}' in text
    assert f"exfm_snapshot_version {float(VERSION)}" in text


def _refs(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from [node["$ref"]] if "$ref" in node else []
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from _refs(item)


def test_the_openapi_document_resolves_and_its_examples_are_accepted(server: Running) -> None:
    document = server.client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    for ref in set(_refs(document)):
        node: Any = document
        for key in ref.removeprefix("#/").split("/"):
            node = node[key]
    served = {route for route, methods in document["paths"].items() for _ in methods}
    assert served >= {"/v1/score", "/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/{name}/infer", "/metrics"}
    for path in ("/v1/score", "/v2/models/{name}/infer"):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        example = body["examples"][SCHEMA.name]["value"]
        answer = server.client.post(path.replace("{name}", "teacher"), json=example)
        assert answer.status_code == 200, answer.text
    row = document["components"]["schemas"]["Row"]
    assert row["properties"]["domain"]["enum"] == ["0", "1"]
    assert row["required"] == ["domain", "features"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def _paths(node: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield here
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from _paths(value, (*here, key))


EXAMPLES = {"/v1/score": {"rows": make_rows(2)}, "/v2/models/teacher/infer": example_tensors(CODEC)}


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(sorted(EXAMPLES)), place=st.randoms(use_true_random=False), value=JSON)
def test_no_change_of_one_value_gives_a_server_error(server: Running, path: str, place: Any, value: Any) -> None:
    body = copy.deepcopy(EXAMPLES[path])
    *way, last = place.choice([p for p in _paths(body) if p])
    node: Any = body
    for key in way:
        node = node[key]
    node[last] = value
    answer = server.client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code in (200, 413, 422), answer.text

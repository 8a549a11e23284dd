"""Rows as tensors of the Open Inference Protocol v2: one input per feature, one output per objective.

Inputs of a request with B rows (see `input_tensors`):

- `domain` BYTES [B], `event_time` INT64 [B] (milliseconds; optional, now)
- a categorical feature: INT64 or BYTES [B]; a numeric feature: FP32 [B]; a nullable one may hold nulls or be left out
- a field of a sequence: `<sequence>.<field>` INT64 or BYTES [B, L], and `<sequence>.time_ms` INT64 [B, L], oldest
  first; `<sequence>.length` INT64 [B] says how many of the L are real (optional, all)

Outputs: `logit.<objective>` and `probability.<objective>`, FP32 [B].
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from das.schema import CategoricalFeature, Feature, FeatureSchema, NumericFeature, SequenceFeature
from services.serve.gate import Refused
from services.serve.rows import RowParser

INTEGERS = frozenset({"INT64", "INT32", "INT16", "INT8", "UINT64", "UINT32", "UINT16", "UINT8"})
ACCEPTED = {
    "INT64": INTEGERS,
    "FP32": INTEGERS | {"FP64", "FP32", "FP16"},
    "BYTES": frozenset({"BYTES"}),
}
MAX_INPUTS = 1024


class Input(msgspec.Struct):
    """A request tensor; `data` is flat or nested, in row-major order."""

    name: str
    shape: list[int]
    datatype: str
    data: list[Any]
    parameters: dict[str, Any] = {}


class Output(msgspec.Struct):
    """An output that the client asks for."""

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(msgspec.Struct):
    """The body of `infer`."""

    inputs: list[Input]
    outputs: list[Output] | None = None
    id: str | None = None
    parameters: dict[str, Any] = {}


def tensor(name: str, datatype: str, *shape: int) -> dict[str, Any]:
    """Tensor metadata; -1 is a free size."""
    return {"name": name, "datatype": datatype, "shape": [-1, *shape]}


def input_tensors(schema: FeatureSchema) -> list[dict[str, Any]]:
    """Metadata of every input, in schema order."""
    tensors = [tensor("domain", "BYTES"), tensor("event_time", "INT64")]
    for feature in schema.features:
        tensors += _feature_tensors(feature)
    return tensors


def output_tensors(schema: FeatureSchema) -> list[dict[str, Any]]:
    """Metadata of every output."""
    kinds = ("logit", "probability")
    return [tensor(f"{kind}.{name}", "FP32") for kind in kinds for name in schema.objective_names]


def _datatype(dtype: str) -> str:
    return "INT64" if dtype == "int" else "BYTES"


def _feature_tensors(feature: Feature) -> list[dict[str, Any]]:
    if isinstance(feature, CategoricalFeature):
        return [tensor(feature.name, _datatype(feature.dtype))]
    if isinstance(feature, NumericFeature):
        return [tensor(feature.name, "FP32")]
    fields = [tensor(f"{feature.name}.{f.name}", _datatype(f.dtype), -1) for f in feature.fields]
    return [*fields, tensor(f"{feature.name}.time_ms", "INT64", -1), tensor(f"{feature.name}.length", "INT64")]


class TensorParser:
    """An `infer` body to the rows that `RowParser.check` takes."""

    def __init__(self, schema: FeatureSchema, parser: RowParser) -> None:
        self._schema = schema
        self._parser = parser
        self._known = {t["name"]: t for t in input_tensors(schema)}
        self._outputs = [t["name"] for t in output_tensors(schema)]
        self._decoder = msgspec.json.Decoder(InferRequest)

    def parse(self, body: bytes) -> tuple[InferRequest, list[dict[str, Any]], list[str]]:
        """The request, its rows and the names of its outputs. Raises Refused naming the tensor."""
        try:
            request = self._decoder.decode(body)
        except (ValueError, RecursionError) as error:
            raise Refused(422, f"body: {error}") from None
        wanted = self._outputs if request.outputs is None else [output.name for output in request.outputs]
        unknown = set(wanted) - set(self._outputs)
        if unknown:
            raise Refused(422, f"outputs: no {sorted(unknown)[0]!r}; known: {', '.join(self._outputs)}")
        num_rows = self._num_rows(request.inputs)
        columns = {tensor.name: self._column(tensor, num_rows) for tensor in request.inputs}
        return request, self._rows(columns, num_rows), wanted

    def _num_rows(self, inputs: list[Input]) -> int:
        if not inputs or len(inputs) > MAX_INPUTS or not inputs[0].shape:
            raise Refused(422, "inputs: send one tensor per feature, the batch as its first dimension")
        names = [tensor.name for tensor in inputs]
        if len(set(names)) != len(names):
            raise Refused(422, "inputs: a name is there twice")
        num_rows = inputs[0].shape[0]
        self._parser.check_count(max(num_rows, 0))
        return num_rows

    def _column(self, given: Input, num_rows: int) -> list[Any]:
        """One value, or one list of values, per row. Raises Refused."""
        known = self._known.get(given.name)
        if known is None:
            raise Refused(422, f"inputs: no {given.name!r}; known: {', '.join(self._known)}")
        if given.datatype not in ACCEPTED[known["datatype"]]:
            raise Refused(422, f"{given.name}: datatype {given.datatype}, expected {known['datatype']}")
        shape = given.shape
        if len(shape) == 2 and len(known["shape"]) == 1 and shape[1] == 1:
            shape = shape[:1]  # clients often send a column as [B, 1]
        if len(shape) != len(known["shape"]) or shape[0] != num_rows or min(shape) < 0:
            raise Refused(422, f"{given.name}: shape {given.shape}, expected {_shown(known['shape'], num_rows)}")
        data = _flat(given.data, depth=len(given.shape))
        if len(data) != math.prod(shape):
            raise Refused(422, f"{given.name}: {len(data)} values for shape {given.shape}")
        if len(shape) == 1:
            return data
        width = shape[1]
        return [data[row * width : (row + 1) * width] for row in range(num_rows)]

    def _rows(self, columns: dict[str, list[Any]], num_rows: int) -> list[dict[str, Any]]:
        """The rows as `/v1/score` has them; whatever is missing there is left for the codec to name."""
        rows: list[dict[str, Any]] = [{"features": {}} for _ in range(num_rows)]
        for name in ("domain", "event_time"):
            for row, value in zip(rows, columns.pop(name, ()), strict=False):
                row[name] = value
        for sequence in self._schema.sequences:
            fields = {f: columns.pop(f"{sequence.name}.{f}", None) for f in _field_names(sequence)}
            lengths = columns.pop(f"{sequence.name}.length", None)
            for index, row in enumerate(rows):
                length = None if lengths is None else _length(sequence, lengths[index])
                events = {f: c[index][:length] for f, c in fields.items() if c is not None}
                row["features"][sequence.name] = events
        for name, column in columns.items():
            for row, value in zip(rows, column, strict=True):
                row["features"][name] = value
        return rows


def _field_names(sequence: SequenceFeature) -> list[str]:
    return [*(f.name for f in sequence.fields), "time_ms"]


def _length(sequence: SequenceFeature, value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value <= sequence.max_length:
        raise Refused(422, f"{sequence.name}.length: {value!r} is not between 0 and {sequence.max_length}")
    return value


def _flat(data: list[Any], depth: int) -> list[Any]:
    """`data` flattened by at most `depth - 1` levels."""
    for _ in range(depth - 1):
        if not data or not isinstance(data[0], list):
            break
        if not all(isinstance(item, list) for item in data):
            raise Refused(422, "inputs: data is flat in one place and nested in another")
        data = [value for item in data for value in item]
    return data


def _shown(shape: list[int], num_rows: int) -> str:
    return f"[{', '.join(str(num_rows) if i == 0 else 'L' for i in range(len(shape)))}]"

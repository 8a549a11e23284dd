"""Opens a recorded table as Arrow batches of the columns the mapping names."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from das.errors import ConfigError

BATCH_ROWS = 4096
CSV_BLOCK_BYTES = 4 << 20
FORMATS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}


class Table:
    """A Parquet, CSV or JSON lines file. Raises ConfigError naming the file, the column and the fix."""

    def __init__(self, path: Path, columns: tuple[str, ...], format_name: str | None = None) -> None:
        self.path = path
        self._columns = list(dict.fromkeys(columns))
        self._format = format_name or FORMATS.get(path.suffix.lower(), "")
        if not self._format:
            raise ConfigError(f"{path}: unknown suffix; set format to parquet, csv or jsonl in the dataset mapping")
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; set data in the dataset mapping or replay.data")

    @property
    def num_rows(self) -> int | None:
        """Rows of the table, where the format says so without reading it all."""
        return int(pq.read_metadata(self.path).num_rows) if self._format == "parquet" else None

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The named columns, a few thousand rows at a time."""
        try:
            yield from {"parquet": self._parquet, "csv": self._csv, "jsonl": self._jsonl}[self._format]()
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"{self.path}: not readable as {self._format}: {error}") from None

    def _check(self, names: list[str]) -> None:
        missing = [name for name in self._columns if name not in names]
        if missing:
            raise ConfigError(
                f"{self.path}: no column {missing}; name the right one in the dataset mapping, "
                f"or remove the feature; the table has {', '.join(names)}"
            )

    def _parquet(self) -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(self.path) as file:
            self._check(file.schema_arrow.names)
            yield from file.iter_batches(BATCH_ROWS, columns=self._columns, use_threads=False)

    def _csv(self) -> Iterator[pa.RecordBatch]:
        """Every column as text: its type is the schema's business, not a guess from the first rows."""
        read = pa.csv.ReadOptions(block_size=CSV_BLOCK_BYTES, use_threads=False)
        with pa.csv.open_csv(self.path, read_options=read) as reader:
            self._check(reader.schema.names)
        convert = pa.csv.ConvertOptions(
            include_columns=self._columns,
            column_types=dict.fromkeys(self._columns, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
        )
        with pa.csv.open_csv(self.path, read_options=read, convert_options=convert) as reader:
            for block in reader:
                for start in range(0, block.num_rows, BATCH_ROWS):
                    yield block.slice(start, BATCH_ROWS)

    def _jsonl(self) -> Iterator[pa.RecordBatch]:
        """One object per line; a key that is absent is null."""
        decoder = msgspec.json.Decoder(dict[str, Any])
        with self.path.open("rb") as file:
            lines = enumerate(file, start=1)
            while chunk := list(islice(lines, BATCH_ROWS)):
                objects = [self._object(decoder, number, line) for number, line in chunk if line.strip()]
                arrays = [
                    self._array(name, [item.get(name) for item in objects], chunk[0][0]) for name in self._columns
                ]
                yield pa.RecordBatch.from_arrays(arrays, names=self._columns)

    def _object(self, decoder: msgspec.json.Decoder[dict[str, Any]], number: int, line: bytes) -> dict[str, Any]:
        try:
            return decoder.decode(line)
        except ValueError as error:
            raise ConfigError(f"{self.path} line {number}: not a JSON object: {error}") from None

    def _array(self, name: str, values: list[Any], line: int) -> pa.Array:
        try:
            return pa.array(values)
        except (pa.ArrowException, OverflowError) as error:
            raise ConfigError(f"{self.path} from line {line}: column '{name}' mixes types: {error}") from None

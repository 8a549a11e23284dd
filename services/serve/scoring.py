"""Answers scoring requests: parse, encode and score in one worker thread, so that the event loop never waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np

from das.deadline import Deadline
from das.messages import Impression, MessageCodec
from services.serve.config import ServeConfig
from services.serve.gate import Refused, unavailable
from services.serve.reload import TeacherSlot
from services.serve.rows import RowParser
from services.serve.teacher import LoadedTeacher
from services.serve.tensors import TensorParser

MODEL_NAME = "teacher"


class Scorer:
    """Turns request bodies into response bodies with the slot's current teacher."""

    def __init__(self, slot: TeacherSlot, codec: MessageCodec, config: ServeConfig) -> None:
        self.slot = slot
        self.schema = codec.schema
        self._rows = RowParser(codec, config.max_rows)
        self._tensors = TensorParser(codec.schema, self._rows)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="score")

    def close(self) -> None:
        """Wait for the request being scored, drop the rest."""
        self._worker.shutdown(cancel_futures=True)

    async def run(self, answer: Callable[[bytes], bytes], body: bytes, deadline: Deadline) -> bytes:
        """`answer(body)` in the worker thread. Raises Refused: 503 once the deadline has passed, or its own."""
        future = asyncio.get_running_loop().run_in_executor(self._worker, answer, body)
        try:
            return await asyncio.wait_for(future, deadline.left_s)
        except TimeoutError:
            raise unavailable("the answer was not ready in time; send fewer rows or try again") from None

    def teacher(self) -> LoadedTeacher:
        """The teacher to score one request with. Raises Refused (503) before there is one."""
        teacher = self.slot.current
        if teacher is None:
            raise unavailable("no teacher snapshot is loaded yet")
        return teacher

    def score(self, body: bytes) -> bytes:
        """Answer `POST /v1/score`."""
        teacher = self.teacher()
        logits_BK = self._logits(teacher, self._rows.parse(body))
        names = self.schema.objective_names
        results = [
            {"logits": dict(zip(names, logits, strict=True)), "probabilities": dict(zip(names, probs, strict=True))}
            for logits, probs in zip(logits_BK.tolist(), _sigmoid(logits_BK).tolist(), strict=True)
        ]
        header = {"teacher_version": teacher.version, "trained_through": teacher.trained_through_ms}
        return msgspec.json.encode({**header, "results": results})

    def infer(self, body: bytes) -> bytes:
        """Answer `POST /v2/models/teacher/infer`."""
        teacher = self.teacher()
        request, rows, wanted = self._tensors.parse(body)
        logits_BK = self._logits(teacher, self._rows.check(rows))
        columns: dict[str, np.ndarray] = {}
        for kind, values in (("logit", logits_BK), ("probability", _sigmoid(logits_BK))):
            columns |= {f"{kind}.{name}": values[:, k] for k, name in enumerate(self.schema.objective_names)}
        outputs = [
            {"name": name, "datatype": "FP32", "shape": [len(rows)], "data": columns[name].tolist()} for name in wanted
        ]
        response: dict[str, Any] = {"model_name": MODEL_NAME, "model_version": str(teacher.version)}
        if request.id is not None:
            response["id"] = request.id
        response |= {"parameters": {"trained_through": teacher.trained_through_ms}, "outputs": outputs}
        return msgspec.json.encode(response)

    def _logits(self, teacher: LoadedTeacher, impressions: list[Impression]) -> np.ndarray:
        logits_BK = teacher.score(impressions)
        bad_B = ~np.isfinite(logits_BK).all(axis=1)
        if bad_B.any():
            raise Refused(422, f"rows[{int(bad_B.argmax())}]: its features give no finite logit; a number is far off")
        return logits_BK


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    """Logistic function without overflow; float32 in and out."""
    tail = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1 / (1 + tail), tail / (1 + tail)).astype(np.float32)

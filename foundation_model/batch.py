"""The model's input: one batch of encoded rows as tensors.

Shape legend: B rows, C categorical features, N numeric columns, T past events of all rows together,
F fields of one sequence, K heads (without Zipper: objectives).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class JaggedSequence:
    """Past events of all rows, concatenated, oldest first within a row.

    ids_TF: int64 ids in the encoder's shared id space. offsets: int32 (B + 1): row b owns the events
    [offsets[b], offsets[b + 1]). age_s: float32 (T) seconds from the past event to the impression, never negative.
    """

    ids_TF: Tensor
    offsets: Tensor
    age_s: Tensor

    @property
    def lengths(self) -> Tensor:
        """Events per row, int32."""
        return self.offsets[1:] - self.offsets[:-1]

    def to(self, device: torch.device | str) -> JaggedSequence:
        """The same on `device`."""
        move: dict[str, Any] = {"device": device, "non_blocking": True}
        return JaggedSequence(self.ids_TF.to(**move), self.offsets.to(**move), self.age_s.to(**move))

    def slice(self, start: int, stop: int) -> JaggedSequence:
        """Rows [start, stop)."""
        offsets = self.offsets[start : stop + 1]
        first, last = int(offsets[0]), int(offsets[-1])
        return JaggedSequence(self.ids_TF[first:last], offsets - first, self.age_s[first:last])

    @staticmethod
    def concat(parts: Sequence[JaggedSequence]) -> JaggedSequence:
        """Rows of all parts in order."""
        shifted, end = [parts[0].offsets], len(parts[0].ids_TF)
        for part in parts[1:]:
            shifted.append(part.offsets[1:] + end)
            end += len(part.ids_TF)
        ids = torch.cat([p.ids_TF for p in parts])
        return JaggedSequence(ids, torch.cat(shifted), torch.cat([p.age_s for p in parts]))


@dataclass(frozen=True, slots=True)
class Batch:
    """Encoded rows.

    cat_BC: int64 ids in the encoder's shared id space. num_BN: float32, transformed; a missing number is 0, and the
    last columns are 0/1 indicators, one per nullable feature. labels_BK: float32 0/1, 0 where the bool label_mask_BK
    is False (not observed, not applicable, or another window's head). domain_B: int64 index into the schema's domains.
    The times are numpy int64 milliseconds since the epoch and stay on the host.
    """

    cat_BC: Tensor
    num_BN: Tensor
    seqs: dict[str, JaggedSequence]
    labels_BK: Tensor
    label_mask_BK: Tensor
    domain_B: Tensor
    event_time_ms_B: np.ndarray
    ingest_time_ms_B: np.ndarray

    @property
    def num_rows(self) -> int:
        """B."""
        return int(self.cat_BC.shape[0])

    def to(self, device: torch.device | str) -> Batch:
        """The same with all tensors on `device`."""
        if torch.device(device) == self.cat_BC.device:
            return self
        move: dict[str, Any] = {"device": device, "non_blocking": True}
        return Batch(
            cat_BC=self.cat_BC.to(**move),
            num_BN=self.num_BN.to(**move),
            seqs={name: s.to(device) for name, s in self.seqs.items()},
            labels_BK=self.labels_BK.to(**move),
            label_mask_BK=self.label_mask_BK.to(**move),
            domain_B=self.domain_B.to(**move),
            event_time_ms_B=self.event_time_ms_B,
            ingest_time_ms_B=self.ingest_time_ms_B,
        )

    def slice(self, start: int, stop: int) -> Batch:
        """Rows [start, stop), as views."""
        return Batch(
            cat_BC=self.cat_BC[start:stop],
            num_BN=self.num_BN[start:stop],
            seqs={name: s.slice(start, stop) for name, s in self.seqs.items()},
            labels_BK=self.labels_BK[start:stop],
            label_mask_BK=self.label_mask_BK[start:stop],
            domain_B=self.domain_B[start:stop],
            event_time_ms_B=self.event_time_ms_B[start:stop],
            ingest_time_ms_B=self.ingest_time_ms_B[start:stop],
        )

    @staticmethod
    def concat(parts: Sequence[Batch]) -> Batch:
        """Rows of all parts in order, a copy; `parts` is not empty and comes from one encoder."""
        return Batch(
            cat_BC=torch.cat([p.cat_BC for p in parts]),
            num_BN=torch.cat([p.num_BN for p in parts]),
            seqs={name: JaggedSequence.concat([p.seqs[name] for p in parts]) for name in parts[0].seqs},
            labels_BK=torch.cat([p.labels_BK for p in parts]),
            label_mask_BK=torch.cat([p.label_mask_BK for p in parts]),
            domain_B=torch.cat([p.domain_B for p in parts]),
            event_time_ms_B=np.concatenate([p.event_time_ms_B for p in parts]),
            ingest_time_ms_B=np.concatenate([p.ingest_time_ms_B for p in parts]),
        )

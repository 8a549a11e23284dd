"""The model's input: one batch of encoded rows as tensors.

Shape legend: B rows, C categorical features, N numeric columns, T past events of all rows together,
F fields of one sequence, K heads (without Zipper: objectives).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
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

    def split(self, sizes: Sequence[int]) -> list[JaggedSequence]:
        """The next `sizes[0]` rows, the next `sizes[1]` rows and so on, which are all."""
        offsets = self.offsets.numpy()
        ends = [0, *accumulate(sizes)]
        own = [offsets[a : b + 1] for a, b in pairwise(ends)]
        events = np.diff(offsets[ends]).tolist()
        parts = zip(self.ids_TF.split(events), own, self.age_s.split(events), strict=True)
        return [JaggedSequence(ids_TF, torch.from_numpy(o - o[0]), age_s) for ids_TF, o, age_s in parts]

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

    def split(self, sizes: Sequence[int]) -> list[Batch]:
        """Views of the next `sizes[0]` rows, the next `sizes[1]` rows and so on, which are all. On the host only."""
        seqs = {name: s.split(sizes) for name, s in self.seqs.items()}
        tensors = (self.cat_BC, self.num_BN, self.labels_BK, self.label_mask_BK, self.domain_B)
        columns = zip(*(tensor.split(list(sizes)) for tensor in tensors), strict=True)
        parts = []
        for i, ((start, stop), (cat_BC, num_BN, labels_BK, mask_BK, domain_B)) in enumerate(
            zip(pairwise([0, *accumulate(sizes)]), columns, strict=True)
        ):
            times = self.event_time_ms_B[start:stop], self.ingest_time_ms_B[start:stop]
            own = {name: s[i] for name, s in seqs.items()}
            parts.append(Batch(cat_BC, num_BN, own, labels_BK, mask_BK, domain_B, *times))
        return parts

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

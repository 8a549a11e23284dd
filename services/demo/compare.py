"""The paired difference of two arms that predicted the same rows of the same stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

Block = Sequence[float]
"""`[rows, positives, logloss_sum]` of consecutive evaluated rows."""

MIN_BLOCKS = 3


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Relative change of normalized entropy, in percent; negative = the second arm is better."""

    percent: float
    low: float
    high: float
    num_blocks: int

    @property
    def significant(self) -> bool:
        """Whether the 95 % interval excludes zero."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        text = f"{self.percent:+.2f} % [{self.low:+.2f}, {self.high:+.2f}]"
        return text if self.significant else f"{text} not significant"


def paired_ne_difference(base: Sequence[Block], other: Sequence[Block]) -> PairedDifference | None:
    """How `other` compares with `base`, with a 95 % interval over their paired blocks; None for too few blocks.

    Both arms saw the same rows and labels, so that the ratio of their NEs is the ratio of their log losses. The
    interval is that of a ratio estimator (Cochran, Sampling Techniques, 1977, section 6.4) with Student's t.
    Raises ValueError when the blocks are not of the same rows.
    """
    if [tuple(b[:2]) for b in base] != [tuple(b[:2]) for b in other]:
        raise ValueError("the two arms were not evaluated on the same rows: their blocks differ in rows or positives")
    if len(base) < MIN_BLOCKS:
        return None
    losses = [block[2] for block in base]
    differences = [b[2] - a[2] for a, b in zip(base, other, strict=True)]
    number, loss_sum = len(losses), math.fsum(losses)
    ratio = math.fsum(differences) / loss_sum
    residuals = math.fsum((d - ratio * loss) ** 2 for d, loss in zip(differences, losses, strict=True))
    error = math.sqrt(residuals * number / (number - 1)) / loss_sum
    half = student_t(0.975, number - 1) * error
    return PairedDifference(100 * ratio, 100 * (ratio - half), 100 * (ratio + half), number)


def student_t(probability: float, degrees: int) -> float:
    """Quantile of Student's t. Exact for 1 and 2 degrees of freedom, else Hill's expansion (error < 0.3 % from 3 on).

    G. W. Hill, Algorithm 396, Communications of the ACM 13 (1970).
    """
    if degrees == 1:
        return math.tan(math.pi * (probability - 0.5))
    if degrees == 2:
        alpha = 4 * probability * (1 - probability)
        return 2 * (probability - 0.5) * math.sqrt(2 / alpha)
    z, n = NormalDist().inv_cdf(probability), float(degrees)
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    g4 = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + g1 / n + g2 / n**2 + g3 / n**3 + g4 / n**4

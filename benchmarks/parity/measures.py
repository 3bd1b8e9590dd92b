"""Errors, what they are held to, and the verdict.

A row holds when its mean and its largest error are both within their limits. Rows of operations that we do
not use are information: they may fail.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

GREY_LEVELS, SHARE, KS, NORMALISED = "grey levels", "share", "KS distance", "normalised value"
"""Units of errors: 1/255 of the range; of one; between distribution functions; after mean and std."""


@dataclass(frozen=True)
class Measure:
    """One comparison."""

    operation: str
    against: str
    """The reference, in words."""
    unit: str
    mean_tolerance: float
    tolerance: float
    """Of the largest error."""
    why: str
    """Why so much is allowed and no more."""


@dataclass(frozen=True)
class Row:
    """What a comparison gave."""

    backend: str
    operation: str
    against: str
    how: str
    """The call that was measured, where the backend's name does not tell."""
    mean_error: float
    max_error: float
    unit: str
    mean_tolerance: float
    tolerance: float
    ok: bool
    why: str
    """Why so much is allowed."""
    used: bool
    """False where the loader does not take this way; then the row is information."""


class Errors:
    """Absolute differences, their mean and the largest, without keeping them."""

    def __init__(self) -> None:
        self._sum, self._count, self._max = 0.0, 0, 0.0

    def add(self, got: ArrayLike, expected: ArrayLike) -> None:
        """Count the differences of two arrays of one shape."""
        got_A, expected_A = np.asarray(got, np.float64), np.asarray(expected, np.float64)
        if got_A.shape != expected_A.shape:
            raise ValueError(f"{got_A.shape} values cannot be compared with {expected_A.shape}")
        difference = np.abs(got_A - expected_A)
        self._sum += float(difference.sum())
        self._count += difference.size
        # A maximum would pass over not-a-number on its way.
        self._max = float(np.max([self._max, difference.max()]))

    def row(self, measure: Measure, backend: str, *, how: str = "", used: bool = True) -> Row:
        """The verdict."""
        if self._count == 0:
            raise ValueError(f"nothing was measured of {measure.operation} by {backend}")
        mean = self._sum / self._count
        ok = mean <= measure.mean_tolerance and self._max <= measure.tolerance
        return Row(
            backend=backend,
            operation=measure.operation,
            against=measure.against,
            how=how,
            mean_error=_rounded(mean),
            max_error=_rounded(self._max),
            unit=measure.unit,
            mean_tolerance=_rounded(measure.mean_tolerance),
            tolerance=_rounded(measure.tolerance),
            ok=ok,
            why=measure.why,
            used=used,
        )


def _rounded(value: float) -> float:
    """Three digits: more would change from one processor to the next."""
    return float(f"{value:.3g}")

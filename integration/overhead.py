"""Median of step overheads, without keeping them: a histogram of whole microseconds."""


class OverheadMedian:
    """Add is O(1); values past the last bucket count as the last one, which the median does not mind."""

    def __init__(self, buckets: int = 2000) -> None:
        self._counts = [0] * buckets
        self._total = 0

    def add(self, spent_ns: int) -> None:
        self._counts[min(spent_ns // 1000, len(self._counts) - 1)] += 1
        self._total += 1

    def median_us(self) -> float:
        """Median in microseconds (the middle of its bucket), 0 before the first value."""
        seen = 0
        for us, count in enumerate(self._counts):
            seen += count
            if 2 * seen >= self._total > 0:
                return us + 0.5
        return 0.0

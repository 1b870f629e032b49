"""Sets of moments as sorted, disjoint intervals (begin, end) in seconds."""

from __future__ import annotations

from collections.abc import Iterable

Intervals = list[tuple[float, float]]


def union(intervals: Iterable[tuple[float, float]]) -> Intervals:
    """The moments in any of the intervals, which may overlap and be empty."""
    found: Intervals = []
    for begin, end in sorted(intervals):
        if end <= begin:
            continue
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def intersection(left: Intervals, right: Intervals) -> Intervals:
    """The moments in both."""
    found: Intervals = []
    i = j = 0
    while i < len(left) and j < len(right):
        begin, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if begin < end:
            found.append((begin, end))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return found


def difference(left: Intervals, right: Intervals) -> Intervals:
    """The moments in `left` that are not in `right`."""
    found: Intervals = []
    for begin, end in left:
        for other_begin, other_end in right:
            if other_end <= begin or other_begin >= end:
                continue
            if other_begin > begin:
                found.append((begin, other_begin))
            begin = other_end
        if begin < end:
            found.append((begin, end))
    return found


def measure(intervals: Intervals) -> float:
    """Seconds in all of them."""
    return sum(end - begin for begin, end in intervals)

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from dipaco.intervals import Intervals, difference, intersection, measure, union

PIECES = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda pair: (float(pair[0]), float(pair[1]))))


def moments(intervals: Intervals) -> set[int]:
    """The unit seconds that the intervals cover."""
    return {second for begin, end in intervals for second in range(int(begin), int(end))}


@given(PIECES, PIECES)
def test_they_are_the_operations_on_sets(first: Intervals, second: Intervals) -> None:
    left, right = union(first), union(second)
    assert moments(left) == moments(first)
    assert moments(intersection(left, right)) == moments(left) & moments(right)
    assert moments(difference(left, right)) == moments(left) - moments(right)
    assert moments(union([*left, *right])) == moments(left) | moments(right)
    for each in (left, intersection(left, right), difference(left, right)):
        assert measure(each) == len(moments(each))
        assert each == sorted(each)
        assert all(end < begin for (_, end), (begin, _) in pairwise(each))

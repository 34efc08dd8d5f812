"""search: coarse to fine, never worse than where it began."""

from hypothesis import given
from hypothesis import strategies as st

from vitq_compiler.search import search

unit = st.floats(0, 1)


@given(unit, unit)
def test_it_finds_the_bottom_of_a_bowl(a: float, b: float) -> None:
    point = search(lambda p: (p[0] - a) ** 2 + 3 * (p[1] - b) ** 2, ((0.0, 1.0), (0.0, 1.0)), (0.0, 0.0), rounds=6)
    assert abs(point[0] - a) < 0.01
    assert abs(point[1] - b) < 0.01


def test_it_stays_in_the_box() -> None:
    seen = []
    search(lambda p: seen.append(p) or -p[0], ((-2.0, 1.0),), (0.0,))  # type: ignore[func-returns-value]
    assert all(-2 <= p[0] <= 1 for p in seen)
    assert max(p[0] for p in seen) == 1


def test_it_is_never_worse_than_the_start_and_asks_once() -> None:
    calls: list[tuple[float, ...]] = []

    def loss(point: tuple[float, ...]) -> float:
        calls.append(point)
        return 0.0 if point == (0.123457,) else 1.0  # a needle that no grid hits

    assert search(loss, ((0.0, 1.0),), (0.1234567,)) == (0.123457,)
    assert len(calls) == len(set(calls))


def test_a_box_without_axes() -> None:
    assert search(lambda p: 1.0, (), ()) == ()

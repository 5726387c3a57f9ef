"""Which captured graph serves a wanted shape. Replays are tested with a family's forward, on a GPU."""

from shared.graphs import Shape, best_fit, sizes


def test_sizes_are_powers_of_two_and_the_most():
    assert sizes(1) == [1]
    assert sizes(6) == [1, 2, 4, 6]
    assert sizes(32) == [1, 2, 4, 8, 16, 32]


def test_best_fit_is_the_smallest_that_holds_both_kinds_of_entries():
    shapes = [Shape(1, 16), Shape(4, 16), Shape(4, 16, riders=1), Shape(4, 16, riders=4), Shape(4, 32, picks=16)]
    assert best_fit(shapes, Shape(1, 16)) == Shape(1, 16)
    assert best_fit(shapes, Shape(3, 16)) == Shape(4, 16)
    assert best_fit(shapes, Shape(1, 16, riders=1)) == Shape(4, 16, riders=1)
    assert best_fit(shapes, Shape(2, 16, riders=3)) == Shape(4, 16, riders=4)
    assert best_fit(shapes, Shape(2, 32, picks=16)) == Shape(4, 32, picks=16)
    assert best_fit(shapes, Shape(2, 32, picks=8)) is None
    assert best_fit(shapes, Shape(5, 16)) is None

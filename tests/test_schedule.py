import math

import pytest

from lightning_rdrop import schedule


@pytest.mark.parametrize(
    ("name", "at_zero", "at_quarter", "at_one"),
    [
        ("constant", 1.0, 1.0, 1.0),
        ("linear", 0.0, 0.25, 1.0),
        ("sigmoid", math.exp(-5), math.exp(-2.8125), 1.0),
        ("cosine", 0.0, 0.5 - math.sqrt(2) / 4, 1.0),
        ("cyclical", 0.0, 0.5, 1.0),
    ],
)
def test_shapes(name, at_zero, at_quarter, at_one):
    shape = schedule.SHAPES[name]
    assert [shape(0.0), shape(0.25), shape(1.0)] == pytest.approx([at_zero, at_quarter, at_one], abs=1e-15)


@pytest.mark.parametrize("shape", schedule.SHAPES.values(), ids=schedule.SHAPES)
def test_shapes_never_fall_and_stay_between_0_and_1(shape):
    factors = [shape(i / 1000) for i in range(1001)]
    assert factors == sorted(factors)
    assert factors[0] >= 0
    assert factors[-1] == 1

import math
from random import Random

import pytest

from lightning_rdrop.compare.statistics import paired_difference, seeds_needed

stats = pytest.importorskip("scipy.stats")


def test_a_table_worked_out_by_hand():
    # differences 2, 1, 3, 0, 4: mean 2, deviations 0, -1, 1, -2, 2, so that sd = sqrt(10 / 4) and se = sqrt(1 / 2)
    difference = paired_difference([12.0, 21.0, 33.0, 40.0, 54.0], [10.0, 20.0, 30.0, 40.0, 50.0])
    assert difference.mean == 2.0
    assert difference.margin == pytest.approx(2.776445105 / math.sqrt(2), rel=1e-9)  # t of 4 degrees, from any table
    assert difference.sign == 1
    assert difference.needed == 8  # of an effect of 2 / 1.5811 = 1.265, for which 7 have a power of 0.795


@pytest.mark.parametrize("seeds", [2, 3, 5, 20])
def test_it_is_the_interval_of_scipy(seeds):
    generator = Random(seeds)
    values, reference = ([generator.gauss(80, 2) for _ in range(seeds)] for _ in "ab")
    interval = stats.ttest_rel(values, reference).confidence_interval(0.95)
    difference = paired_difference(values, reference)
    assert difference.mean - difference.margin == pytest.approx(interval.low, rel=1e-9)
    assert difference.mean + difference.margin == pytest.approx(interval.high, rel=1e-9)
    assert difference.sign == int(interval.low > 0) - int(interval.high < 0)


def test_it_is_shown_where_the_interval_leaves_zero_out():
    assert paired_difference([1.0, 1.1, 0.9], [0.0, 0.0, 0.0]).sign == 1
    assert paired_difference([0.0, 0.0, 0.0], [1.0, 1.1, 0.9]).sign == -1
    assert paired_difference([1.0, -1.1, 0.9], [0.0, 0.0, 0.0]).sign == 0


def test_one_seed_and_nan_show_nothing():
    for values, reference in (([1.0], [0.0]), ([1.0, math.nan, 2.0], [0.0, 0.0, 0.0])):
        difference = paired_difference(values, reference)
        assert math.isnan(difference.margin)
        assert (difference.sign, difference.needed) == (0, None)


@pytest.mark.parametrize("shift", [0.0, 0.01])
@pytest.mark.parametrize("reference", [[0.8, 0.8], [0.8, 0.7, 0.6]])
@pytest.mark.parametrize("digits", [16, 6])
def test_differences_that_do_not_vary_show_nothing(shift, reference, digits):
    values = [float(f"{value / 3 + shift / 3:.{digits}g}") for value in reference]  # 0.01 / 3 but for rounding
    difference = paired_difference(values, [float(f"{value / 3:.{digits}g}") for value in reference])
    assert difference.mean == pytest.approx(shift / 3, abs=1e-6)
    assert math.isnan(difference.margin)
    assert (difference.sign, difference.needed) == (0, None)


@pytest.mark.parametrize(("effect", "needed"), [(0.2, 199), (0.3, 90), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_the_seeds_of_the_published_tables(effect, needed):
    """Cohen 1988; G*Power 3.1, difference between two dependent means, two-sided, power 0.8."""
    assert seeds_needed(effect) == needed


def test_so_many_seeds_do_see_it():
    """By simulation: 80 of 100 such experiments find the difference."""
    numpy = pytest.importorskip("numpy")
    for effect, fewer in ((0.7, 2), (1.265, 2), (6.0, 1)):
        seeds = seeds_needed(effect)
        for count, enough in ((seeds, True), (seeds - fewer, False)):
            drawn = numpy.random.default_rng(0).normal(effect, 1.0, (20_000, count))
            found = (stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < 0.05).mean()
            assert (found > 0.79) == enough


def test_no_number_of_seeds_shows_next_to_nothing():
    assert seeds_needed(1e-6) is None
    assert seeds_needed(0.0) is None

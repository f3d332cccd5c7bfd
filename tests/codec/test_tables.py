import decimal
import hashlib
import math

import numpy as np
import pytest

from mrcnf.codec import tables


@pytest.mark.parametrize("index", [0, 64, 200, tables.WIDEST - 1])
def test_gaussian_tables_are_gaussian(index):
    table = tables.gaussian(index)
    reach = tables.reach(index)
    places = np.arange(-reach, reach + 1)
    density = np.exp(-0.5 * (places / 2 ** (index / 64)) ** 2)
    assert table.sum() == 1 << 24 and table.min() >= 1 and len(table) == len(places)
    assert (table == table[::-1]).all()
    exact = density / density.sum()
    assert np.abs(table / 2**24 - exact).max() < 2e-7 + 1e-4 * exact.max()


def test_tables_are_those_of_the_format():
    """Whoever changes one bit of them writes another format."""
    digest = hashlib.sha256()
    for index in range(0, tables.WIDEST, 37):
        digest.update(tables.gaussian(index).astype("<i8").tobytes())
        digest.update(tables.escaping(index).astype("<i8").tobytes())
    for index in range(0, tables.LAPLACES, 9):
        digest.update(tables.laplace(index).astype("<i8").tobytes())
    digest.update(tables.truncated(6, 10).astype("<i8").tobytes())
    digest.update(np.array([tables.logarithm(i) for i in range(3000)], "<i8").tobytes())
    assert digest.hexdigest()[:16] == DIGEST


DIGEST = "a5168636be85db7e"


def test_the_decimal_context_of_a_program_does_not_change_tables():
    expected = tables.gaussian(100)
    tables.gaussian.cache_clear()
    tables.reach.cache_clear()
    with decimal.localcontext(decimal.Context(prec=5, rounding=decimal.ROUND_UP)):
        assert (tables.gaussian(100) == expected).all()


def test_rotation_begins_where_it_says():
    table = tables.gaussian(200)
    turned, start = tables.rotated(table, 5, 16)
    assert (np.roll(turned, start) == table).all()
    passed = table[:start].sum() / 2**24
    assert abs(passed - 5 / 16) < table.max() / 2**24


def test_truncated_tables_fill_the_cell():
    table = tables.truncated(6, 8)
    middles = (np.arange(256) + 0.5) / 256 - 0.5
    density = np.exp(-0.5 * (6 * middles) ** 2)
    np.testing.assert_allclose(table / 2**24, density / density.sum(), atol=1e-6)
    assert table.sum() == 1 << 24


def test_logarithms():
    assert [tables.logarithm(v) for v in (0, 1, 3, 255)] == [0, 64, 128, 512]
    assert tables.logarithm(4) == round(64 * math.log2(5))

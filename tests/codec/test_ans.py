import math
import sys

import constriction
import numpy as np
import pytest

from mrcnf.codec import ans, tables
from mrcnf.codec.ans import CodingError, Stack, Underflow
from mrcnf.errors import UserError


def stack(words=20_000, seed=0):
    rng = np.random.default_rng(seed)
    return Stack(rng.integers(1, 2**32, words, dtype=np.uint32))


def test_what_is_pushed_comes_back_and_leaves_the_stack_as_it_was():
    found, rng = stack(), np.random.default_rng(1)
    before = found.words()
    scale = rng.integers(0, 1200, (3, 50, 7))
    wild = np.rint(rng.standard_normal(scale.shape) * 2.0 ** (scale / 64)).astype(np.int64)
    wild[0, 0, :4] = 2**62, -(2**62), 5_000_000, -1  # most of them beyond any table
    levels = rng.integers(0, tables.LAPLACES, (40, 5))
    steps = rng.integers(-3000, 3000, levels.shape)
    whole = rng.integers(0, 2**40, 100)
    parts = rng.integers(0, 2**14, (4, 9))
    found.push_normal(wild, scale)
    found.push_normal(wild, 300)
    found.push_laplace(steps, levels)
    found.push_uniform(whole, 40)
    found.push_truncated(parts, 6, 14)
    assert (found.pop_truncated(parts.shape, 6, 14) == parts).all()
    assert (found.pop_uniform(whole.shape, 40) == whole).all()
    assert (found.pop_laplace(levels) == steps).all()
    assert (found.pop_normal(wild.shape, 300) == wild).all()
    assert (found.pop_normal(wild.shape, scale) == wild).all()
    assert (found.words() == before).all()


def test_noise_is_gaussian_and_can_be_given_back():
    found = stack(60_000)
    before, bits = found.words(), found.bits()
    scale = np.random.default_rng(2).integers(64, 1000, (100, 1000))
    noise = found.pop_noise(scale, (1, 2, 3))
    units = noise / 2.0 ** (scale / 64)
    assert abs(units.std() - 1) < 0.01 and abs(units.mean()) < 0.01 and np.abs(units).max() < 9
    entropy = (0.5 * math.log2(2 * math.pi * math.e) + scale / 64).sum()
    assert abs((bits - found.bits()) / entropy - 1) < 1e-3
    found.push_noise(noise, scale, (1, 2, 3))
    assert (found.words() == before).all()


def test_pushing_costs_what_the_density_says():
    found, rng = stack(), np.random.default_rng(3)
    scale = np.full(20_000, 700)
    values = np.rint(rng.standard_normal(scale.shape) * 2.0 ** (700 / 64)).astype(np.int64)
    before = found.bits()
    found.push_normal(values, scale)
    exact = (0.5 * (values / 2.0 ** (700 / 64)) ** 2).sum() / math.log(2)
    exact += len(values) * (0.5 * math.log2(2 * math.pi) + 700 / 64)
    assert abs((found.bits() - before) / exact - 1) < 1e-4


def test_noise_is_not_the_residual_just_pushed():
    """A pop under what was pushed last would give exactly that."""
    found, rng = stack(), np.random.default_rng(4)
    scale = np.full(20_000, 300)
    pushed = np.rint(rng.standard_normal(scale.shape) * 2.0 ** (300 / 64)).astype(np.int64)
    found.push_normal(pushed, 300)
    popped = found.pop_noise(scale, (0,))
    assert abs(np.corrcoef(pushed, popped)[0, 1]) < 0.05
    assert (found.copy().pop_normal(scale.shape, 300) != popped).mean() > 0.9


def test_keys_decide_on_the_rotation():
    one, other = stack(), stack()
    scale = np.full(1000, 300)
    assert (one.pop_noise(scale, (1, 2)) != other.pop_noise(scale, (2, 1))).mean() > 0.8
    assert len(set(ans.keyed(1000, 5).tolist()) | set(ans.keyed(1000, 6).tolist())) == 2000
    # Of the format: these never change.
    assert [int(k) % 1000 for k in ans.keyed(3, 1, 2)] == KEYED


KEYED = [936, 436, 653]


def test_the_model_of_a_table_has_exactly_its_frequencies():
    """The state of an ANS coder after one symbol is a function of its frequency (Duda 2009)."""
    table = np.array([5, 3, 2, (1 << 24) - 10])
    model = ans._model(table)
    for symbol, below in enumerate((0, 5, 8, 10)):
        coder = constriction.stream.stack.AnsCoder(np.array([1, 2, 3, 4], np.uint32))
        state = coder.pos()[1]
        coder.encode_reverse(np.array([symbol], np.int32), model)
        frequency = int(table[symbol])
        assert coder.pos()[1] == (state // frequency << 24) + below + state % frequency


def test_an_empty_stack_does_not_make_up_bits():
    found = Stack(np.array([1, 2, 3, 4, 5], np.uint32))
    with pytest.raises(Underflow, match="ran out of bits"):
        found.pop_uniform((100,), 16)


def test_low_water_mark():
    found = stack(1000)
    found.pop_uniform((400,), 16)  # 200 words
    found.push_uniform(np.zeros(4000, np.int64), 16)
    assert abs(found.low - 798) <= 1
    words, low = found.words(), found.low
    # Whoever undoes it needs no more than what is above the mark, and one to show it.
    reader = Stack(words[low - 1 :])
    reader.pop_uniform((4000,), 16)
    found.mark()
    assert found.low == len(words) - 2


def test_words_that_are_no_stack_are_refused():
    for words in ([], [1, 2], [1, 2, 3, 0]):
        with pytest.raises(CodingError):
            Stack(np.array(words, np.uint32))


def test_noise_beyond_its_table_is_refused():
    with pytest.raises(CodingError, match="beyond its table"):
        stack().push_noise(np.array([10_000]), np.array([64]), (0,))


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(UserError, match=r"pip install 'mrcnf\[compress\]'"):
        ans.require()

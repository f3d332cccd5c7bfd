"""Shuffles: permutations that keep volumes, invert exactly, and learn what they say they do."""

import math

import pytest
import torch
from fields import awake

from mrcnf.errors import UserError
from mrcnf.flows import shuffle as shuffles
from mrcnf.flows.shuffle import SHUFFLES, ContextShuffle, LearnedShuffle, entropy

KINDS = [(kind, coarse) for kind in SHUFFLES for coarse in (0, 2)]
EVERY = pytest.mark.parametrize("kind, coarse_channels", KINDS)


def case(kind, coarse_channels, n=3, channels=8):
    """A shuffle, what it shuffles, and its coarse image or None."""
    shuffle = awake(shuffles.build(kind, channels, coarse_channels), 0.5)
    y = torch.randn(n, channels, 2, 3, dtype=torch.float64)
    coarse = torch.randn(n, coarse_channels, 2, 3, dtype=torch.float64) if coarse_channels else None
    shuffle.measure(y * torch.arange(channels, 0, -1)[:, None, None])
    return shuffle, y, coarse


@EVERY
def test_volumes_are_kept(kind, coarse_channels):
    shuffle, y, coarse = case(kind, coarse_channels)
    for i in range(3):
        condition = None if coarse is None else coarse[i : i + 1]

        def push(image, condition=condition):
            return shuffle(image, condition)[0].flatten()

        jacobian = torch.autograd.functional.jacobian(push, y[i : i + 1]).reshape(48, 48)
        assert torch.linalg.slogdet(jacobian).logabsdet == 0
        assert torch.equal(jacobian @ y[i].flatten(), push(y[i : i + 1]))


@EVERY
def test_the_inverse_is_exact_and_all_but_none_move_something(kind, coarse_channels):
    shuffle, y, coarse = case(kind, coarse_channels)
    shuffled, _ = shuffle(y, coarse)
    assert torch.equal(shuffle.invert(shuffled, coarse), y)
    assert torch.equal(shuffled, y) == (kind == "none")
    assert torch.equal(shuffled.sort(1).values, y.sort(1).values)


@pytest.mark.parametrize("coarse_channels", [0, 2])
def test_each_image_has_an_order_of_its_own(coarse_channels):
    shuffle, y, coarse = case("context", coarse_channels, n=20)
    orders = shuffle.order(y, coarse)
    assert orders.shape == (20, 8) and len(orders.unique(dim=0)) > 3
    together, _ = shuffle(y, coarse)
    for i in range(20):
        alone, _ = shuffle(y[i : i + 1], None if coarse is None else coarse[i : i + 1])
        assert torch.equal(alone[0], together[i])


def test_without_a_coarse_image_the_first_quarter_stays_and_says_the_order():
    shuffle, y, _ = case("context", 0, n=20)
    shuffled, _ = shuffle(y)
    assert torch.equal(shuffled[:, :2], y[:, :2])
    assert not torch.equal(shuffled[:, 2:], y[:, 2:])
    other = y.clone()
    other[:, 2:] = torch.randn_like(other[:, 2:])
    assert torch.equal(shuffle.order(other, None), shuffle.order(y, None))
    other[:, :2] = 3 * torch.randn_like(other[:, :2])
    assert not torch.equal(shuffle.order(other, None), shuffle.order(y, None))


def test_a_random_order_is_drawn_once():
    shuffle, y, _ = case("random", 0, channels=16)
    before = shuffle.order(y, None).clone()
    shuffle.measure(3 * y)
    assert torch.equal(shuffle.order(3 * y, None), before)
    others = [shuffles.build("random", 16).order(y, None) for _ in range(4)]
    assert not all(torch.equal(other, before) for other in others)


def test_entropies_of_the_normal_and_the_uniform():
    """½ log 2πeσ² and log of the width."""
    n = 20_000
    y = torch.stack([torch.randn(n), 3 * torch.randn(n) + 7, torch.rand(n), 0.2 * torch.rand(n)])
    found = entropy(y.T.reshape(n // 4, 4, 4).mT.reshape(n // 4, 4, 2, 2))
    normal = 0.5 * math.log(2 * math.pi * math.e)
    expected = torch.tensor([normal, normal + math.log(3), 0, math.log(0.2)], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


def test_a_constant_channel_has_a_finite_entropy_below_all_others():
    y = torch.randn(50, 4, 2, 2)
    y[:, 2] = 1.5
    found = entropy(y)
    assert found.isfinite().all() and found.argmin() == 2


def test_channels_of_the_largest_entropy_leave():
    shuffle = shuffles.build("entropy", 4)
    scales = torch.tensor([4.0, 1.0, 8.0, 2.0])
    y = torch.randn(500, 4, 2, 2) * scales[:, None, None]
    assert shuffle.order(y, None).tolist() == [0, 1, 2, 3]
    shuffle.measure(y)
    assert shuffle.order(y, None).tolist() == [1, 3, 0, 2]
    again = shuffles.build("entropy", 4)
    again.load_state_dict(shuffle.state_dict())
    assert again.order(y, None).tolist() == [1, 3, 0, 2]


# -- learned -----------------------------------------------------------------------------------


def test_the_penalty_is_the_divergence_of_the_weights():
    shuffle, y, _ = case("learned", 0)
    _, penalty = shuffle.train()(y)
    first, _, last = shuffle.weights
    w = last(first(torch.ones(8, dtype=torch.float64)).relu()).softmax(0)
    inner, _, outer = shuffle.excitation
    v = outer(inner(y.mean((2, 3))).relu()).softmax(1)
    expected = 1e-3 * (v * (v / w).log()).sum(1)
    torch.testing.assert_close(penalty, expected, rtol=1e-10, atol=0)
    assert (penalty > 0).all() and penalty.shape == (3,)


def test_the_penalty_teaches_both_weights_and_is_not_there_in_use():
    shuffle, y, _ = case("learned", 0)
    shuffled, penalty = shuffle.train()(y)
    gradients = torch.autograd.grad(penalty.sum(), list(shuffle.parameters()))
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    used, none = shuffle.eval()(y)
    assert none is None and torch.equal(used, shuffled)


def test_the_order_is_that_of_the_learned_weights():
    shuffle, y, _ = case("learned", 0)
    wanted = torch.tensor([3.0, 1.0, 7.0, 0.0, 2.0, 6.0, 5.0, 4.0], dtype=torch.float64)
    with torch.no_grad():
        shuffle.weights[2].weight.zero_()
        shuffle.weights[2].bias.copy_(wanted)
    shuffle.train()(y)  # what is trained with is what is kept
    assert shuffle.eval().order(y, None).tolist() == [3, 1, 4, 0, 7, 6, 5, 2]


def test_weights_that_agree_cost_nothing():
    shuffle = LearnedShuffle(8)
    with torch.no_grad():
        for last in (shuffle.weights[2], shuffle.excitation[2]):
            last.weight.zero_()
            last.bias.copy_(torch.arange(8.0))
    _, penalty = shuffle(torch.randn(3, 8, 2, 2))
    assert penalty.abs().max() < 1e-8


# -- context -----------------------------------------------------------------------------------


def softsort(weights):
    """Prillo & Eisenschlos 2020, eq. 5, by loops, smallest first, at temperature 0.1."""
    rows = []
    for ranked in weights.sort().values:
        scores = torch.stack([-(ranked - w).abs() / 0.1 for w in weights])
        rows.append(scores.exp() / scores.exp().sum())
    return torch.stack(rows)


@pytest.mark.parametrize("coarse_channels", [0, 2])
def test_gradients_are_those_of_the_relaxed_permutation(coarse_channels):
    """By differences of the relaxed one, in the direction of every parameter at once."""
    shuffle, y, coarse = case("context", coarse_channels)
    target = torch.randn(y.shape, dtype=torch.float64)
    parameters = list(shuffle.parameters())
    value, _ = shuffle(y, coarse)
    gradients = torch.autograd.grad((value * target).sum(), parameters)
    directions = [torch.randn_like(p) for p in parameters]
    fixed = shuffle.fixed

    def relaxed():
        weights = shuffle.weights(y, coarse)
        rows = [softsort(w) @ image[fixed:].flatten(1) for w, image in zip(weights, y, strict=True)]
        return (torch.stack(rows) * target[:, fixed:].flatten(2)).sum().item()

    ends = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += step * direction
            ends.append(relaxed())
    along = sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True))
    assert along == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-3, abs=1e-4)
    assert abs(along) > 1e-2


def test_the_image_and_what_is_read_get_the_gradient_of_the_hard_order():
    shuffle, y, coarse = case("context", 2)
    target = torch.randn(y.shape, dtype=torch.float64)
    y.requires_grad_()
    coarse.requires_grad_()
    value, _ = shuffle(y, coarse)
    value.backward(target)
    order = shuffle.order(y, coarse)
    expected = torch.stack([t[o.argsort()] for t, o in zip(target, order, strict=True)])
    assert torch.equal(y.grad, expected)
    assert coarse.grad is None


def test_a_likelihood_teaches_the_order():
    """The second half is to be small, and a coarse image says where the small ones are."""
    shuffle = ContextShuffle(4, 1)
    optimizer = torch.optim.Adam(shuffle.parameters(), lr=0.02)
    scales = torch.tensor([[3.0, 3.0, 0.1, 0.1], [0.1, 0.1, 3.0, 3.0]])
    which = torch.arange(64) % 2
    coarse = (2.0 * which - 1)[:, None, None, None].expand(-1, 1, 2, 2)

    def cost():
        y = torch.randn(64, 4, 2, 2) * scales[which][:, :, None, None]
        shuffled, _ = shuffle(y, coarse)
        return shuffled[:, 2:].square().mean()

    before = sum(cost().item() for _ in range(10)) / 10
    for _ in range(150):
        optimizer.zero_grad()
        cost().backward()
        optimizer.step()
    after = sum(cost().item() for _ in range(10)) / 10
    assert before > 2 and after < 0.1


def test_an_unknown_shuffle_is_one_clear_line():
    with pytest.raises(UserError, match="unknown shuffle 'sorted'; choose one of none, random"):
        shuffles.build("sorted", 8)

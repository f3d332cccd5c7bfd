"""The optimiser: Muon's directions, and who gets them."""

import math

import pytest
import torch
from tiny import images, metrics, tiny, trained
from torch import nn
from trainers import trainer_of

from mrcnf.errors import UserError
from mrcnf.flows.residual_field import ResidualField
from mrcnf.runs import checkpoint
from mrcnf.training.optim import Optimizer, Schedule
from mrcnf.training.trainer import Trainer

GOOD = torch.zeros(())


def test_muon_steps_along_the_nearest_orthogonal_matrix():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 3, 3, 3))
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    Optimizer([weight, nn.Parameter(torch.zeros(1))], [weight], 0.99).step(1e-2, GOOD)
    moved = (before - weight.detach()).flatten(1) / 1e-2
    u, _, vt = torch.linalg.svd(weight.grad.flatten(1), full_matrices=False)
    size = 0.2 * max(moved.shape) ** 0.5  # of Adam's updates, root mean square
    # Five Newton-Schulz steps in bfloat16 bring the singular values near 1, not onto it.
    assert torch.linalg.svdvals(moved / size).sub(1).abs().max() < 0.35
    assert torch.cosine_similarity(moved.flatten(), (u @ vt).flatten(), dim=0) > 0.97


def test_decay_shrinks_the_weights_that_muon_trains():
    """Decoupled from the gradient (Loshchilov & Hutter 2019): by 1 - rate·decay a step."""
    hidden, other = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.randn(5))
    before = [p.detach().clone() for p in (hidden, other)]
    for p in (hidden, other):
        p.grad = torch.zeros_like(p)
    Optimizer([hidden, other], [hidden], 0.99, weight_decay=2.0).step(1e-2, GOOD)
    torch.testing.assert_close(hidden.detach(), 0.98 * before[0])
    assert torch.equal(other.detach(), before[1])


def test_adam_takes_the_rest():
    torch.manual_seed(0)
    field = ResidualField(6, 3, width=4, depth=2)
    hidden = {id(w) for w in field.hidden_weights()}
    names = {name for name, p in field.named_parameters() if id(p) in hidden}
    assert names == {
        *(f"blocks.{i}.{part}.weight" for i in range(2) for part in ("inner", "outer")),
        "coarse.2.weight", "coarse.4.weight",
    }  # fmt: skip
    ours = list(field.parameters())
    twin = ResidualField(6, 3, width=4, depth=2)
    twin.load_state_dict(field.state_dict())
    theirs = [p for p, q in zip(twin.parameters(), ours, strict=True) if id(q) not in hidden]
    optimizer, adam = Optimizer(ours, field.hidden_weights(), 0.99), torch.optim.Adam(
        theirs, lr=1e-2, betas=(0.9, 0.99)
    )  # fmt: skip
    for _ in range(3):
        for p, q in zip(ours, twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step(1e-2, GOOD)
        adam.step()
    for (name, p), q in zip(field.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6) == (name not in names)


@pytest.mark.parametrize("first, second", [("adam", "muon"), ("muon", "adam")])
def test_another_optimisers_moments_are_refused(tmp_path, first, second):
    trained(tmp_path / "run", f"train.optimizer={first}", level=4)
    with pytest.raises(UserError, match=f"optimizer is {first}"):
        trained(tmp_path / "run", f"train.optimizer={second}", level=4, resume=True)
    settings = tiny(f"train.optimizer={first}")
    assert Trainer(settings, 4, images(), tmp_path / "run", resume=True).finished




def test_the_learning_rate_rises_and_falls_by_steps_or_by_the_clock():
    by_steps = Schedule(peak=2.0, warmup=4, steps=100)
    assert [by_steps.learning_rate(step, 1e9) for step in (0, 50, 100)] == pytest.approx(
        [0.5, 1.0, 0.0]
    )
    by_clock = Schedule(peak=2.0, warmup=4, steps=100, minutes=2.0)
    rates = [by_clock.learning_rate(500, seconds) for seconds in (0.0, 60.0, 120.0, 200.0)]
    assert rates == pytest.approx([2.0, 1.0, 0.0, 0.0])
    straight = Schedule(peak=2.0, warmup=4, steps=100, fall="linear")
    assert [straight.learning_rate(step, 0.0) for step in (3, 25, 100)] == pytest.approx(
        [1.94, 1.5, 0.0]
    )
    flat = Schedule(peak=2.0, warmup=4, steps=100, fall="constant")
    assert flat.learning_rate(99, 0.0) == 2.0


def test_training_by_the_clock_ends_with_it_and_resumes(tmp_path):
    settings = tiny("train.minutes=0.01")  # 0.6 s
    trainer = Trainer(settings, 4, images(), tmp_path / "run")
    trainer.advance()
    trainer.seconds = 0.3
    assert not trainer.finished and trainer.progress == pytest.approx(0.5)
    trainer.save()
    resumed = Trainer(settings, 4, images(), tmp_path / "run", resume=True)
    assert resumed.seconds == trainer.seconds
    resumed.run(progress=False)
    assert resumed.finished and resumed.seconds >= 0.6
    assert metrics(tmp_path / "run", 4)[-1]["step"] == resumed.step_number
    assert checkpoint.unfinished(tmp_path / "run") == ["level 2 is not trained yet"]


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_learning_rate_rises_then_follows_its_schedule(tmp_path, schedule):
    trainer = trainer_of(
        tmp_path, f"train.schedule={schedule}", "train.warmup=10", "train.steps=100",
        "train.learning_rate=0.5",
    )  # fmt: skip
    rates = []
    for trainer.step_number in range(101):
        rates.append(trainer.schedule.learning_rate(trainer.step_number, 0.0))
    falling = [(1 + math.cos(math.pi * k / 100)) / 2 for k in range(101)]
    fall = falling if schedule == "cosine" else [1] * 101
    expected = [0.5 * min(1, (k + 1) / 10) * fall[k] for k in range(101)]
    assert rates == pytest.approx(expected)

"""The update: bad gradients leave no trace, the average is the one that is documented."""

import math
from itertools import pairwise

import pytest
import torch
from tiny import metrics
from trainers import finished, poisoned, same, trainer_of, weights


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_bad_step_is_skipped_and_counted(tmp_path, value, optimizer):
    trainer = trainer_of(tmp_path / "run", f"train.optimizer={optimizer}")
    trainer = poisoned(trainer, value, {1, 2})
    history = [[p.detach().clone() for p in trainer.update.parameters]]
    moments = []
    for _ in range(4):
        trainer.advance()
        history.append([p.detach().clone() for p in trainer.update.parameters])
        moments.append({k: v.clone() for k, v in trainer.update.optimizer.state_dict().items()})
    changed = [
        any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        for before, after in pairwise(history)
    ]
    assert changed == [True, False, False, True]
    assert same(moments[0], moments[2]) and not same(moments[2], moments[3])
    assert any(name.startswith("muon") for name in moments[0]) == (optimizer == "muon")
    assert [row["skipped"] for row in metrics(tmp_path / "run", 4)] == [0, 1, 2, 2]
    assert all(p.isfinite().all() for p in weights(tmp_path / "run", 4).values())


def test_the_average_follows_the_weights(tmp_path):
    trainer = trainer_of(tmp_path, "train.ema=0.3", "train.steps=6")
    average = [p.detach().clone() for p in trainer.update.parameters]
    for k in range(6):
        trainer.step()
        decay = min(0.3, (1 + k) / (10 + k))
        average = [decay * a + (1 - decay) * p.detach()
                   for a, p in zip(average, trainer.update.parameters, strict=True)]  # fmt: skip
    for kept, expected in zip(trainer.update.average, average, strict=True):
        torch.testing.assert_close(kept, expected)
    averaged = dict(finished(trainer).named_parameters())
    for (name, raw), kept in zip(
        trainer.level.named_parameters(), trainer.update.average, strict=True
    ):
        assert torch.equal(averaged[name], kept) and not torch.equal(averaged[name], raw)


def test_without_averaging_the_last_weights_are_saved(tmp_path):
    trainer = trainer_of(tmp_path / "run", "train.ema=0")
    trainer.run(progress=False)
    assert same(weights(tmp_path / "run", 4), trainer.level.state_dict())


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_gradients_are_clipped_to_their_largest_norm(tmp_path, factor):
    trainer = trainer_of(tmp_path)
    trainer.step()
    gradients = [p.grad.clone() for p in trainer.update.parameters]
    norm = torch.nn.utils.get_total_norm(gradients)
    for parameter, gradient in zip(trainer.update.parameters, gradients, strict=True):
        parameter.grad = gradient * factor / norm
    found = trainer.update.apply(1, 0.0)
    assert float(found) == pytest.approx(factor, rel=1e-5)
    clipped = torch.nn.utils.get_total_norm([p.grad for p in trainer.update.parameters])
    assert float(clipped) == pytest.approx(min(factor, 1.0), rel=1e-5)


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_the_average_serves_in_the_level_itself(tmp_path, ema):
    trainer = trainer_of(tmp_path, f"train.ema={ema}")
    for _ in range(3):
        trainer.step()
    before = {name: tensor.clone() for name, tensor in trainer.level.state_dict().items()}
    for_use = {name: tensor.clone() for name, tensor in trainer.update.averaged_state().items()}
    assert same(for_use, before) == (ema == 0)
    with pytest.raises(ZeroDivisionError), trainer.update.averaged() as level:
        assert level is trainer.level and not level.training
        assert same(level.state_dict(), for_use)
        raise ZeroDivisionError
    assert trainer.level.training
    assert same(trainer.level.state_dict(), before)

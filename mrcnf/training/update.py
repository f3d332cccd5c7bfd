"""What a step does to the weights once their gradients are there: clipping, skipping, averaging.

The average that is saved for use is an exponential moving one (EMA).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from mrcnf.model.level import Level
from mrcnf.runs.settings import TrainConfig
from mrcnf.training.optim import Optimizer


class Update:
    """Clip the gradients, skip them if they explode, move the weights and their average.

    Nothing waits for the device: whether a step is skipped is decided, obeyed and counted there
    (and `Watch.log` gives up after too many in a row).

    Args:
        level: with its first weights, on its device.
        train: how it is trained.
    """

    def __init__(self, level: Level, train: TrainConfig) -> None:
        self.level, self.train = level, train
        self.parameters = list(level.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        hidden = level.flow.hidden_weights() if train.optimizer == "muon" else []
        self.optimizer = Optimizer(self.parameters, hidden, train.beta2, train.weight_decay)
        self.skipped = torch.zeros(3, device=self.parameters[0].device)
        """Steps skipped in all, in a row now, and in a row at the worst."""

    def apply(self, step: int, learning_rate: float) -> Tensor:
        """One update from the parameters' gradients; returns their norm, a scalar.

        Args:
            step: how many came before.
        """
        train = self.train
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, (train.clip / (norm + 1e-12)).clamp(max=1.0))
        bad = (~norm.isfinite() | (norm > train.skip_above)).float()
        in_a_row = (self.skipped[1] + 1) * bad
        self.skipped = torch.stack(
            (self.skipped[0] + bad, in_a_row, torch.maximum(self.skipped[2], in_a_row))
        )
        self.optimizer.step(learning_rate, bad)
        # The first weights are no better than any others: the average is short in the beginning.
        decay = min(train.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        return norm

    def averaged_state(self) -> dict[str, Tensor]:
        """The level's state_dict for use: with the average, or with `train.ema` 0 as it is."""
        state = dict(self.level.state_dict())
        if self.train.ema:
            names = [name for name, _ in self.level.named_parameters()]
            state |= dict(zip(names, self.average, strict=True))
        return state

    @contextlib.contextmanager
    def averaged(self) -> Iterator[Level]:
        """Within: the level with its weights for use, in eval mode; afterwards it is as before.

        The level that is trained, and not a copy: that one is compiled.
        """
        weights = [p.detach() for p in self.parameters]
        kept = [w.clone() for w in weights]
        if self.train.ema:
            torch._foreach_copy_(weights, self.average)
        self.level.eval()
        try:
            yield self.level
        finally:
            torch._foreach_copy_(weights, kept)
            self.level.train()

"""The optimiser of one level: Adam alone, or Adam and Muon; and its learning rate over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_ADAM = ("step", "exp_avg", "exp_avg_sq")


class Optimizer:
    """Steps that leave weights and moments as they are where a flag on the device says so.

    Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest orthogonal matrix; a
    convolution counts as the matrix from its patches to its channels. Updates are scaled to
    the size of Adam's (Liu et al. 2025, arXiv 2502.16982), so both share one learning rate.

    Args:
        parameters: all that are trained.
        hidden: those of them that Muon takes: weights between hidden layers, not the first
            or the last. Empty: Adam for all.
        beta2: decay of Adam's second moment.
        weight_decay: of the hidden weights, per step and unit of learning rate. Orthogonal
            updates never shrink, so without it weights grow, and steps are smaller and smaller
            beside them.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        hidden: Sequence[nn.Parameter],
        beta2: float,
        weight_decay: float = 0.0,
    ) -> None:
        self.parameters, self.hidden = list(parameters), list(hidden)
        chosen = {id(p) for p in self.hidden}
        self.others = [p for p in self.parameters if id(p) not in chosen]
        self.adam = torch.optim.Adam(self.others, fused=True, betas=(0.9, beta2))
        # Muon takes matrices only; these share memory with the weights.
        self.matrices = [p.detach().view(len(p), -1) for p in self.hidden]
        self.muon = (
            torch.optim.Muon(
                self.matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )
            if self.matrices
            else None
        )

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float, bad: Tensor) -> None:
        """One update from the parameters' gradients; none where `bad`, a scalar, is 1."""
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        self.adam.found_inf = bad  # type: ignore[attr-defined]  # the fused kernel skips on it
        self.adam.step()
        if self.muon is None:
            return
        for group in self.muon.param_groups:
            group["lr"] = learning_rate
        for parameter, matrix in zip(self.hidden, self.matrices, strict=True):
            gradient = parameter.grad
            matrix.grad = None if gradient is None else gradient.where(bad == 0, 0.0).flatten(1)
        momenta = [s["momentum_buffer"] for s in self.muon.state.values()]
        # Momentum moves the weights even where the gradient is 0, so both are put back.
        before = [(tensor, tensor.clone()) for tensor in (*self.matrices, *momenta)]
        self.muon.step()
        for tensor, old in before:
            tensor.copy_(torch.where(bad > 0, old, tensor))

    def state_dict(self) -> dict[str, Tensor]:
        """The moments, by name."""
        tensors = {
            f"adam.{i}.{name}": value
            for i, parameter in enumerate(self.others)
            for name, value in self.adam.state[parameter].items()
        }
        if self.muon is not None:
            for i, matrix in enumerate(self.matrices):
                if momentum := self.muon.state[matrix]:
                    tensors[f"muon.{i}"] = momentum["momentum_buffer"]
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take up the moments of `state_dict`; those that are missing begin at nought.

        Raises:
            RuntimeError: they are another optimiser's.
        """
        for i, parameter in enumerate(self.others):
            if f"adam.{i}.step" in tensors:  # absent before the first good step
                self.adam.state[parameter] = {
                    name: tensors[f"adam.{i}.{name}"].to(parameter.device) for name in _ADAM
                }
        if self.muon is None:
            if any(name.startswith("muon.") for name in tensors):
                raise RuntimeError("its train.optimizer is muon")
            return
        for i, matrix in enumerate(self.matrices):
            if f"muon.{i}" in tensors:
                momentum = tensors[f"muon.{i}"].to(matrix.device)
                self.muon.state[matrix]["momentum_buffer"] = momentum
            elif "adam.0.step" in tensors:
                raise RuntimeError("its train.optimizer is adam")


@dataclass(frozen=True)
class Schedule:
    """A linear rise over the first steps, then a fall to 0 at the end."""

    peak: float
    warmup: int
    steps: int
    minutes: float = 0.0
    """Training time that decides the end instead of `steps`, unless it is 0."""
    fall: str = "cosine"
    """cosine (half a period), linear, or constant: no fall."""

    def progress(self, step: int, seconds: float) -> float:
        """How much is done after so many steps and so much time, from 0 to 1."""
        return min(1.0, seconds / (60 * self.minutes) if self.minutes else step / self.steps)

    def learning_rate(self, step: int, seconds: float) -> float:
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        progress = self.progress(step, seconds)
        fall = {
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
            "linear": 1 - progress,
            "constant": 1.0,
        }[self.fall]
        return self.peak * rise * fall

"""The paths from data to noise that flow matching follows, at times from `training.times`.

    y_t = α(t)·y + β(t)·z,    z ~ N(0, I),    α(0) = 1, β(0) = σ,    α(1) = 0, β(1) = 1

σ is the standard deviation of the noise that the data come with: 0 with uniform
dequantisation, whose noise is not Gaussian and so is part of y; with Gaussian dequantisation
a number per channel, and y are the clean coefficients: dequantised images are the path's
points at t = 0 (Zheng et al., arXiv 2305.03935, start at a later time to the same end).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

PATHS = ("straight", "variance-preserving")


class Path(NamedTuple):
    """A path at some times: shapes broadcast to (N, C, H, W)."""

    alpha: Tensor
    beta: Tensor
    alpha_rate: Tensor
    """dα/dt"""
    beta_rate: Tensor
    """dβ/dt"""

    def point(self, y: Tensor, z: Tensor) -> Tensor:
        return self.alpha * y + self.beta * z

    def velocity(self, y: Tensor, z: Tensor) -> Tensor:
        """d/dt of `point`: z - y on straight paths without noise in the data."""
        return self.alpha_rate * y + self.beta_rate * z

    @property
    def wronskian(self) -> Tensor:
        """α·β' - α'·β, which turns an error of y into one of the velocity, times β."""
        return self.alpha * self.beta_rate - self.alpha_rate * self.beta

    @property
    def likelihood_weight(self) -> Tensor:
        """What an error of the velocity weighs in the evidence lower bound, per dt: α/(β·W).

        Half the fall of the signal-to-noise ratio α²/β² weighs the squared error of y
        (Kingma et al. 2021, in continuous time), which is (β/W)² times the velocity's.
        """
        return self.alpha / (self.beta * self.wronskian)


def at(kind: str, t: Tensor, noise: Tensor) -> Path:
    """The path of `PATHS` at times t, any shape; `noise` is σ, broadcast against t.

    straight: α = 1 - t (Lipman et al. 2023); variance-preserving: α = cos(πt/2), the cosine
    schedule (Nichol & Dhariwal 2021). β runs from σ to 1 with t, or with sin(πt/2).
    """
    if kind == "straight":
        one = torch.ones_like(t)
        return Path(1 - t, noise + (1 - noise) * t, -one, (1 - noise) * one)
    quarter = math.pi / 2
    alpha, rise = (quarter * t).cos(), (quarter * t).sin()
    return Path(
        alpha, noise + (1 - noise) * rise, -quarter * rise, (1 - noise) * quarter * alpha
    )

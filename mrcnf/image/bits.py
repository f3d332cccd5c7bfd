"""From log-densities to log-probabilities of integers, and to bits per dimension."""

from __future__ import annotations

import math

from torch import Tensor


def log_prob_of_integers(log_density: Tensor, log_q: Tensor, dims: int, nbits: int = 8) -> Tensor:
    """The bound of `noise` for each noise draw: log p(x) - log q(u) - D·log 2^b, in nats."""
    return log_density - log_q - dims * nbits * math.log(2.0)


def bits_per_dim(log_prob: Tensor, dims: int) -> Tensor:
    """Nats per image (log P of the integer image) to bits per dimension.

    >>> import torch
    >>> bits_per_dim(torch.tensor(-2 * math.log(256.0)), dims=2).item()
    8.0
    """
    return -log_prob / (dims * math.log(2.0))

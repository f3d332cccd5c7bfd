"""Between integer pixels and continuous densities.

An image is X ∈ {0..255}^D (with fewer bits, {0..2^b-1}^D). It is dequantised once, at the
finest resolution: x = (X + u) / 2^b with u in the unit cell and density q(u). Then

    log P(X) ≥ E_u[log p(x) - log q(u)] - D·log 2^b          (Theis et al. 2016; Ho et al. 2019)

holds for every density p and every q inside the cell.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mrcnf.errors import UserError

NOISES = ("uniform", "gaussian")
GAUSSIAN_STD = 1.0 / 6.0
"""Standard deviation of the Gaussian noise before truncation, in cells."""


def dequantise(
    images: Tensor,
    *,
    nbits: int = 8,
    kind: str = "uniform",
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Fill every pixel's cell with noise.

    Args:
        images: uint8 (N, C, H, W). With nbits < 8 the low bits are dropped first.
        kind: "uniform", or "gaussian": centred in the cell, standard deviation 1/6 of a cell,
            truncated to it (Zheng et al., arXiv 2305.03935, in its single-resolution form).
        generator: on the device of the images.

    Returns:
        x: (N, C, H, W) in [0, 1).
        log_q: (N,) nats, log q(u) of the noise, in cell units (0 for uniform noise).
    """
    check_images(images)
    dtype = dtype or torch.get_default_dtype()
    if not 1 <= nbits <= 8 or dtype not in (torch.float32, torch.float64):
        raise UserError(f"cannot dequantise {nbits} bits in {dtype}; use 1 to 8 in float32 or 64")
    levels = 2**nbits
    integers = (images >> (8 - nbits)).to(dtype)
    u = torch.rand(images.shape, generator=generator, device=images.device, dtype=dtype)
    if kind == "uniform":
        log_q = torch.zeros(len(images), device=images.device, dtype=dtype)
    elif kind == "gaussian":
        u, log_q = _truncated_gaussian(u)
    else:
        raise UserError(f"unknown dequantisation {kind!r}; choose one of {', '.join(NOISES)}")
    # Rounding up to the next integer would leave the cell; the largest float below 1 does not.
    cell_end = 1 - torch.finfo(dtype).eps * levels
    return (integers + u.clamp(max=cell_end)) / levels, log_q


def log_density(u: Tensor, kind: str) -> Tensor:
    """log q(u) of a kind of noise (N, C, H, W) in cells, in nats, (N,)."""
    if kind == "uniform":
        return u.new_zeros(len(u))
    return _log_truncated((u.double() - 0.5) / GAUSSIAN_STD).to(u.dtype)


def quantise(x: Tensor, *, nbits: int = 8) -> Tensor:
    """Density units to uint8 images: the cell that x lies in, out-of-range values clamped.

    With nbits < 8 the b-bit integers are spread over 0..255; dropping the low bits
    gives them back.
    """
    levels = 2**nbits
    integers = (x * levels).floor().clamp(0, levels - 1)
    # In integers: 7 · (255/7) is 254.99998 in single precision.
    return (integers.to(torch.int32) * 255 // (levels - 1)).to(torch.uint8)


def check_images(images: Tensor, channels: int | None = None) -> None:
    """Raise UserError unless `images` is uint8 (N, C, H, W) with the given channels."""
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise UserError(
            f"images must be a uint8 tensor of shape (N, C, H, W), got {images.dtype} of shape "
            f"{tuple(images.shape)}"
        )
    if channels is not None and images.shape[1] != channels:
        raise UserError(
            f"images have {images.shape[1]} channel(s) but the model was built for {channels}; "
            "convert the images or choose another model"
        )


def _truncated_gaussian(u: Tensor) -> tuple[Tensor, Tensor]:
    """Noise in the unit cell by the inverse distribution function, and its log-density (N,)."""
    half_width = 0.5 / GAUSSIAN_STD
    inside = math.erf(half_width / math.sqrt(2.0))
    # The quantile function loses digits near ±1 in single precision.
    z = math.sqrt(2.0) * torch.erfinv((2 * u.double() - 1) * inside)
    z = z.clamp(-half_width, half_width)
    return (0.5 + GAUSSIAN_STD * z).to(u.dtype), _log_truncated(z).to(u.dtype)


def _log_truncated(z: Tensor) -> Tensor:
    """The log-density (N,), in cell units, of noise that is z standard deviations off centre."""
    inside = math.erf(0.5 / GAUSSIAN_STD / math.sqrt(2.0))
    log_norm = math.log(GAUSSIAN_STD * inside) + 0.5 * math.log(2 * math.pi)
    return (-0.5 * z**2 - log_norm).flatten(1).sum(1)

"""The oracle of the codec's rate, against algebra."""

import torch
from fields import LinearField, matrix

from experiments import codec_oracle
from mrcnf.flows.base import log_normal
from mrcnf.flows.continuous import ContinuousFlow


def test_of_a_linear_flow_local_bits_back_costs_what_the_noise_moves_z_by():
    linear, generator = matrix(8), torch.Generator().manual_seed(0)
    f = codec_oracle.Map(ContinuousFlow([LinearField(linear)]), 16)
    y, *noise = torch.randn(4, 2, 2, 2, generator=generator, dtype=torch.float64).split(1)
    noise = torch.cat((*noise, *(-e for e in noise)))
    sigma = torch.tensor([0.1, 0.2]).double()[:, None, None]
    with torch.no_grad():
        reached, jacobian = f(y), f.jacobian(y)
        density = codec_oracle.density(reached, jacobian)
        nats = codec_oracle.dense(f, y, sigma, noise, reached, jacobian)
    exact = torch.linalg.matrix_exp(linear)
    torch.testing.assert_close(jacobian, exact, rtol=0, atol=1e-4)
    z = y.flatten(1) @ exact.T
    assert abs(density - float(-log_normal(z) - linear.trace())) < 1e-3
    # f⁻¹(z) is off y by just the noise, so that nothing but -log N(z) changes.
    moved = (sigma * noise).flatten(1) @ exact.T
    expected = density + moved.square().sum(1).mean() / 2
    torch.testing.assert_close(nats.mean(), expected, rtol=0, atol=1e-3)

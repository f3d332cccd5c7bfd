"""Compiled levels: what runs is compiled, in every objective and in evaluation, at every level."""

import pytest
import torch

from mrcnf.flows.solve import Solver
from mrcnf.flows.trace import Trace
from mrcnf.image.noise import dequantise
from mrcnf.model.level import Level, likelihoods
from mrcnf.model.settings import FieldConfig, ModelConfig
from mrcnf.training.objectives import flow_matching, likelihood


class Counting:
    """A backend that compiles nothing and counts how often its graphs run."""

    def __init__(self):
        self.runs = 0

    def __call__(self, graph, inputs):
        def run(*values):
            self.runs += 1
            return graph.forward(*values)

        return run


def levels(noise, kind):
    config = ModelConfig(resolutions=(2, 4, 8), channels=1, dequantisation=noise)
    field = FieldConfig(kind=kind, width=4, depth=1)
    torch.manual_seed(0)
    return [Level(config, r, field, Solver(steps=2), Trace()) for r in config.resolutions]


def ran(backend, work):
    before = backend.runs
    answer = work()
    return backend.runs - before, answer


@pytest.mark.filterwarnings("ignore")  # PyTorch's tracer warns of what it does itself
@pytest.mark.slow
@pytest.mark.parametrize("noise, kind", [("uniform", "paper"), ("variational", "residual")])
def test_every_level_runs_compiled_at_every_shape_in_training_and_evaluation(noise, kind):
    """More shapes than torch.compile makes code for, if the levels had to share its count."""
    torch._dynamo.reset()
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    x, log_q = dequantise(images, generator=torch.Generator().manual_seed(1))
    how = {"solver": Solver(steps=2), "trace": Trace()}

    def seeded():
        return torch.Generator().manual_seed(2)

    for level in levels(noise, kind):
        works = {
            "likelihood": lambda n, level=level: likelihood(
                level, x[:n], log_q[:n], generator=seeded(), **how
            )[0],
            "flow matching": lambda n, level=level: flow_matching(
                level, x[:n], generator=seeded()
            )[0],
            "evaluation": lambda n, level=level: likelihoods(
                [level], x[:n], log_q[:n], generator=seeded()
            )[level.resolution].log_prob,
        }
        if kind == "residual":
            (field,) = level.flow
            field.near, known = field.new_near(), Trace("calibrated")
            works["calibrated evaluation"] = lambda n, level=level, known=known: likelihoods(
                [level], x[:n], log_q[:n], generator=seeded(), trace=known
            )[level.resolution].log_prob
        plain = {(name, n): work(n) for name, work in works.items() for n in (4, 3)}
        backend = Counting()
        level.compile(backend=backend, fullgraph=True)
        for (name, n), expected in plain.items():
            with torch.set_grad_enabled("evaluation" not in name):
                count, found = ran(backend, lambda work=works[name], n=n: work(n))
            # Two steps of the midpoint rule; flow matching asks once.
            assert count >= (1 if name == "flow matching" else 4), (level.resolution, name, n)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

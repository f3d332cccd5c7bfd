"""Training couplings and split flows: the same promises as any level's."""

import math

import pytest
import torch
from tiny import images, metrics, tiny, trained
from trainers import same, trainer_of, weights

from mrcnf import runtime
from mrcnf.errors import UserError
from mrcnf.flows.shuffle import entropy
from mrcnf.image.noise import dequantise
from mrcnf.measure import evaluate
from mrcnf.model.level import Level
from mrcnf.runs import checkpoint
from mrcnf.training.prepare import prepare_level

LIKELIHOOD = "train.objective=likelihood"
COUPLING = [LIKELIHOOD, "flow.kind=coupling", "flow.couplings=2"]
SPLIT = [*COUPLING, "model.resolutions=[4,8]", "flow.splits=1"]
FLOWS = {
    "coupling": COUPLING,
    "random": [*SPLIT, "flow.shuffle=random"],
    "learned": [*SPLIT, "flow.shuffle=learned"],
    "entropy": [*SPLIT, "flow.shuffle=entropy", "flow.reorder_every=2", "train.steps=8"],
    "context": [*SPLIT, "flow.shuffle=context", "flow.prior=conditional"],
    "continuous": [LIKELIHOOD, "model.resolutions=[4,8]", "flow.splits=1", "flow.shuffle=context"],
}
EVERY = pytest.mark.parametrize("name", FLOWS)


def data_of(name, seed=0):
    return images(side=4 if name == "coupling" else 8, seed=seed)


def finest(name):
    return data_of(name).pixels.shape[-1]


@EVERY
def test_a_stopped_run_resumes_to_the_same_weights(tmp_path, name):
    settings, data, level = FLOWS[name], data_of(name), finest(name)
    trained(tmp_path / "whole", *settings, data=data, level=level)
    after_three = iter([False] * 3 + [True]).__next__
    trainer = trainer_of(tmp_path / "part", *settings, data=data, level=level)
    trainer.run(progress=False, stop=after_three)
    assert trainer.step_number == 3
    trained(tmp_path / "part", *settings, data=data, level=level, resume=True)
    assert same(weights(tmp_path / "part", level), weights(tmp_path / "whole", level))
    assert metrics(tmp_path / "part", level) == metrics(tmp_path / "whole", level)


@EVERY
def test_every_flow_learns(tmp_path, name):
    settings = [*FLOWS[name], "train.steps=20", "train.learning_rate=0.03", "train.ema=0.9",
                "train.batch=12", "train.checkpoint_every=1000", "train.flip=false"]  # fmt: skip
    data, level = data_of(name), finest(name)
    trainer = trainer_of(tmp_path / "run", *settings, data=data, level=level)
    before = evaluate.level_bits(trainer.level.eval(), data.pixels)
    trainer.level.train()
    start = [parameter.clone() for parameter in trainer.update.parameters]
    trainer.run(progress=False)
    after = evaluate.level_bits(checkpoint.load_level(tmp_path / "run", level), data.pixels)
    gain = before - after
    assert gain.mean() > 5 * gain.std() / math.sqrt(len(gain)) and gain.mean() > 0.02
    moved = [not torch.equal(a, b) for a, b in zip(start, trainer.update.parameters, strict=True)]
    assert all(moved)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("coupling", {"bpd"}),
        ("context", {"bpd"}),
        ("learned", {"bpd", "penalty"}),
        ("continuous", {"bpd", "kinetic", "frobenius"}),
    ],
)
def test_the_loss_is_bits_and_what_the_flow_has_beside_them(tmp_path, name, parts):
    trainer = trainer_of(tmp_path, *FLOWS[name], data=data_of(name), level=finest(name))
    found = trainer.step()
    assert found.keys() == {"loss", "gradient_norm", *parts}
    terms = [(part, 0.01 if part in ("kinetic", "frobenius") else 1.0) for part in parts]
    total = sum(weight * found[part] for part, weight in terms)
    torch.testing.assert_close(found["loss"], total)
    if name == "learned":
        assert 0 < found["penalty"] < 0.1


def test_orders_are_measured_on_schedule_in_the_first_half_and_kept(tmp_path, monkeypatch):
    measured, reorder = [], Level.reorder

    def watched(level, x):
        measured.append((trainer.step_number, len(x)))
        reorder(level, x)

    monkeypatch.setattr(Level, "reorder", watched)
    settings = [*SPLIT, "flow.shuffle=entropy", "flow.reorder_every=3", "train.steps=14"]
    trainer = trainer_of(tmp_path / "run", *settings, level=8, data=images(side=8))
    orders = []
    while not trainer.finished:
        trainer.advance()
        orders.append(trainer.level.flow.gates[0].shuffle.fixed.clone())
    assert measured == [(0, 256), (3, 256), (6, 256)]
    assert all(torch.equal(order, orders[6]) for order in orders[6:])
    kept = checkpoint.load_level(tmp_path / "run", 8).flow.gates[0].shuffle.fixed
    assert torch.equal(kept, orders[-1])
    monkeypatch.undo()
    other = trainer_of(tmp_path / "random", *FLOWS["random"], level=8, data=images(side=8))
    assert not other._reorders()


def test_the_order_is_that_of_the_entropies_of_training_images():
    """Measured as the level starts: what leaves has more than what stays."""
    data = images(200, side=8)
    level = prepare_level(tiny(*SPLIT, "flow.shuffle=entropy"), 8, data)
    x, _ = dequantise(data.pixels, generator=torch.Generator().manual_seed(1))
    y, condition, _ = level.prepare(x)
    level.reorder(x)
    (split,) = level.flow.split(y, condition)
    assert entropy(split.stays).max() <= entropy(split.leaves).min()


def test_a_level_starts_with_normalised_couplings():
    level = prepare_level(tiny(*COUPLING), 4, images(100))
    y, condition, _ = level.prepare((images(100).pixels + 0.5) / 256)
    latent = level.flow.log_prob(y, condition).latent
    assert latent.mean((0, 2, 3)).abs().max() < 0.1
    torch.testing.assert_close(latent.std((0, 2, 3)), torch.ones(3), rtol=0.1, atol=0)


def test_the_average_for_use_and_the_test_curve_are_of_the_flow(tmp_path):
    settings = [*FLOWS["context"], "train.ema=0.5", "train.evaluate_every=2"]
    test = images(side=8, seed=1)
    trainer = trainer_of(tmp_path / "run", *settings, level=8, data=images(side=8), test=test)
    trainer.run(progress=False)
    curve = [row["test_bpd"] for row in metrics(tmp_path / "run", 8) if "test_bpd" in row]
    assert len(curve) == 2 and all(math.isfinite(bits) for bits in curve)
    level = checkpoint.load_level(tmp_path / "run", 8)
    bits = evaluate.level_bits(level, test.pixels)
    assert curve[-1] == pytest.approx(float(bits.mean()), abs=0.05)
    now = dict(trainer.level.named_parameters())
    assert not all(torch.equal(p, now[name]) for name, p in level.named_parameters())


@pytest.mark.parametrize("name", FLOWS)
def test_flow_matching_of_flows_without_one_velocity_is_refused(tmp_path, name):
    settings = [*FLOWS[name], "train.objective=flow-matching"]
    words = rf"level {finest(name)}: flow matching trains a velocity.*train\.objective = likelihood"
    with pytest.raises(UserError, match=words) as error:
        trainer_of(tmp_path / "run", *settings, data=data_of(name), level=finest(name))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_crops_are_multiples_of_what_splits_halve(tmp_path):
    settings = [*SPLIT, "model.resolutions=[8,16]", "train.crop=8"]
    trainer_of(tmp_path / "run", *settings, level=16, data=images(side=16)).step()
    with pytest.raises(UserError, match="crop 12 must be a multiple of 8"):
        trainer_of(tmp_path, *settings, "train.crop=12", level=16, data=images(side=16))


def test_muon_trains_split_flows(tmp_path):
    settings = [*FLOWS["context"], "train.optimizer=muon"]
    trained(tmp_path / "run", *settings, data=images(side=8), level=8)
    assert all(math.isfinite(row["loss"]) for row in metrics(tmp_path / "run", 8))


def test_bfloat16_trains_couplings_and_splits(tmp_path):
    for name in ("coupling", "context", "learned"):
        low, high = (
            trainer_of(
                tmp_path / name / precision, *FLOWS[name], f"train.precision={precision}",
                data=data_of(name), level=finest(name),
            )
            for precision in ("bfloat16", "float32")
        )  # fmt: skip
        losses = [[float(t.step()["loss"]) for _ in range(3)][-1] for t in (low, high)]
        assert losses[0] == pytest.approx(losses[1], rel=0.05)
        assert all(p.dtype == torch.float32 for p in low.update.parameters)


def test_variational_noise_is_learned_by_couplings(tmp_path):
    settings = [*FLOWS["coupling"], "model.dequantisation=variational"]
    trained(tmp_path / "run", *settings, data=images(), level=4)
    assert all(math.isfinite(row["loss"]) for row in metrics(tmp_path / "run", 4))


@pytest.mark.parametrize(
    "name",
    ["coupling", *[pytest.param(n, marks=pytest.mark.slow) for n in ("entropy", "continuous")]],
)
@pytest.mark.filterwarnings("ignore")  # PyTorch's tracer warns of what it does itself
def test_compiled_flows_are_the_same(tmp_path, name, monkeypatch):
    """Without a compiler: the graphs that there are, run as they are."""
    torch._dynamo.reset()
    runs = []

    def backend(graph, inputs):
        def run(*values):
            runs.append(1)
            return graph.forward(*values)

        return run

    compile_level = Level.compile
    monkeypatch.setattr(runtime, "require_compiler", lambda *_: None)
    monkeypatch.setattr(Level, "compile", lambda level: compile_level(level, backend=backend))
    data, level = data_of(name), finest(name)
    settings = [*FLOWS[name], "train.steps=2"]
    plain = trained(tmp_path / "plain", *settings, data=data, level=level)
    assert not runs
    fast = trained(tmp_path / "fast", *settings, "train.compile=true", data=data, level=level)
    assert len(runs) >= 4
    one, other = weights(plain, level), weights(fast, level)
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(other[key], one[key], rtol=1e-3, atol=1e-3)

"""Spoilt files through the whole decoder: refused, or the images that went in; never others."""

import resource

import pytest
import torch
from fuzzing import fuzz
from tiny import images, smooth_images, trained

import mrcnf
from mrcnf import codec

pytest.importorskip("constriction", reason="the extra compress is not installed")


@pytest.fixture(scope="module", params=[("exact", 1), ("exact", 3), ("integer", 1)])
def model(request, tmp_path_factory):
    (pyramid, channels), run = request.param, tmp_path_factory.mktemp("run")
    settings = (f'model.pyramid="{pyramid}"', f"model.channels={channels}")
    return mrcnf.load(trained(run / "tiny", *settings, data=images(channels=channels)))


@pytest.fixture(scope="module")
def files(model):
    """Of one image, of several sizes with names, of constants and noise, in parts and streams."""
    several = [*smooth_images(3, model.config.channels), *smooth_images(2, side=6)]
    hard = [torch.zeros(1, 4, 4), torch.full((1, 4, 4), 255), torch.randint(0, 256, (1, 4, 4))]
    return [
        codec.compress(model, smooth_images(1), steps=2),
        codec.compress(model, several, names=["a", "b", "c", "d", "e"], steps=2),
        codec.compress(model, [image.to(torch.uint8) for image in hard], steps=2),
        codec.compress(model, smooth_images(1, model.config.channels, side=64)[:, :, :2], steps=1),
        codec.encode(model, smooth_images(3), steps=1, streams=2, bound=False).data,
    ]


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


def spoil(model, files, count, resolution=None, **options):
    def read(data):
        return codec.decompress(model, data, resolution=resolution)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = fuzz(files, read, count, same=same, **options)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB
    return refused


def test_spoilt_files_are_never_other_images(model, files):
    assert spoil(model, files, 300) == 300
    assert spoil(model, files, 30, mend=True) > 10


def test_spoilt_files_are_never_other_coarse_images(model, files):
    if model.config.pyramid == "exact":
        pytest.skip("levels that owe each other bits have no coarse images")
    # The last bytes do not matter to them.
    assert spoil(model, files, 150, resolution=2) > 50
    assert spoil(model, files, 30, resolution=2, mend=True) > 5


@pytest.mark.slow
def test_many_spoilt_files_are_never_other_images(model, files):
    assert spoil(model, files, 60_000, seed=4) == 60_000
    assert spoil(model, files, 2_000, mend=True, seed=5) > 1_000
    if model.config.pyramid == "integer":
        assert spoil(model, files, 2_000, resolution=2, mend=True, seed=6) > 600

"""A module of a user's own, with all that may be right and wrong in it; a run that names it."""

from tiny import images, tiny

from mrcnf.training.trainer import Trainer

CODE = '''\
import numpy as np
import torch
from torch import nn

import mrcnf

NUMBER = 3


class Field(mrcnf.Field):
    def __init__(self, channels, coarse_channels, width=2):
        super().__init__()
        self.first = nn.Conv2d(channels + coarse_channels + 1, width, 3, padding=1)
        self.last = nn.Conv2d(width, channels, 1)

    def value(self, t, y, context):
        clock = t.reshape(-1, 1, 1, 1).expand(len(y), 1, *y.shape[2:])
        seen = (y, clock) if context is None else (y, clock, context)
        return self.last(nn.functional.silu(self.first(torch.cat(seen, 1))))


class Narrow(mrcnf.Field):
    def __init__(self, channels):
        super().__init__()


class Failing(Field):
    def value(self, t, y, context):
        return y / (1 // 0)


class Flat(Field):
    def value(self, t, y, context):
        return super().value(t, y, context).mean((2, 3), keepdim=True)


class Unready(mrcnf.Field):
    def __init__(self, channels, coarse_channels):
        self.layer = nn.Conv2d(channels, channels, 1)


class Empty(mrcnf.Field):
    def __init__(self, channels, coarse_channels):
        super().__init__()

    def value(self, t, y, context):
        return y


class Flow(mrcnf.Flow):
    solved = False

    def __init__(self, channels, coarse_channels):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def log_prob(self, y, condition=None, **_):
        z = y * self.scale.exp()
        log = torch.distributions.Normal(0.0, 1.0).log_prob(z) + self.scale
        return mrcnf.FlowResult(log.flatten(1).sum(1), y[0].numel(), z)

    def transport(self, y, condition=None, *, backwards=False, **_):
        return y * (-self.scale if backwards else self.scale).exp()


class Unfinished(mrcnf.Flow):
    pass


class Crooked(Flow):
    def transport(self, y, condition=None, **_):
        return y + 1


class Shrinking(Flow):
    def transport(self, y, condition=None, **_):
        return y[:, :, ::2]


class Terse(Flow):
    def log_prob(self, y, condition=None, **_):
        return super().log_prob(y).log_prob


def shades(split, resolution, count=4):
    return np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(4, 2).repeat(4, 3)


def mapped(split, resolution):
    return mrcnf.data.load("npy:images.npy", split)


def none(split, resolution):
    return None


def floats(split, resolution):
    return np.zeros((4, 1, resolution, resolution), np.float32)


def flat(split, resolution):
    return torch.zeros(4, resolution, resolution, dtype=torch.uint8)


def unknown_option(split):
    return None


def refusing(split, resolution):
    raise mrcnf.UserError("no such split")


def vector(level, x, log_q, *, generator):
    return level.log_prob(x).log_prob


def detached(level, x, log_q, *, generator):
    return vector(level, x, log_q, generator=generator).mean().detach()


def number(level, x, log_q, *, generator):
    return 1.0


def unlogged(level, x, log_q, *, generator):
    losses = vector(level, x, log_q, generator=generator)
    return losses.mean(), {"losses": losses}


def raising(level, x, log_q, *, generator):
    return 1 / 0
'''


def write(folder):
    """The module as own.py."""
    (folder / "own.py").write_text(CODE)


def own_run(folder, name="run"):
    """A run of two levels with the module's field, trained in its folder."""
    settings = tiny("field.kind=own:Field", "field.width=48", "field.depth=4", "train.steps=2")
    for level in (2, 4):
        Trainer(settings, level, images(), folder / name).run(progress=False)
    return folder / name

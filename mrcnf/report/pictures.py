"""A page's sections of pictures: samples, upscalings, nearest training images."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mrcnf.image.grid import enlarge
from mrcnf.report.document import Block, Code, Picture, Text
from mrcnf.report.numbers import command, of_each
from mrcnf.report.subject import TEMPERATURES, Enlarged, Subject


def samples(subjects: Sequence[Subject]) -> list[Block]:
    """Samples at several temperatures, and of every level."""
    missing: list[Block] = []
    blocks: list[Block] = []
    alone = len(subjects) == 1
    temperatures = TEMPERATURES if alone else TEMPERATURES[:1]
    for subject, _ in of_each(subjects, lambda subject: subject.samples(1.0), missing):
        for temperature in temperatures:
            drawn = subject.samples(temperature)[subject.model.config.finest]
            caption = f"{len(drawn)} samples at temperature {temperature:g}"
            caption += " (the model itself)." if temperature == 1 else "."
            blocks.append(
                Picture(
                    drawn,
                    subject.columns,
                    f"Two rows of images drawn from {subject.name} at temperature {temperature:g}",
                    caption if alone else f"{subject.name}: {caption}",
                )
            )
        if alone:
            blocks += _levels(subject)
    shown = [subject for subject, _ in of_each(subjects, lambda subject: subject.samples(1.0), [])]
    if shown:
        words = "Every temperature has the same noise. More of them, and others:"
        blocks.append(Text(words if alone else "The same seed for every run. More of them:"))
        colder = ("--temperature", TEMPERATURES[1]) if alone else ()
        options = ("--n", 64, *colder, "--out", "grid.png")
        blocks.append(Code("\n".join(command(s, "sample", *options) for s in shown)))
    return [*blocks, *missing]


def _levels(subject: Subject) -> list[Block]:
    drawn, finest, columns = subject.samples(1.0), subject.model.config.finest, subject.columns
    if len(drawn) == 1:
        return [Text("The model has one level, so nothing coarser to show.", aside=True)]
    rows = [enlarge(images[:columns], finest // r) for r, images in drawn.items()]
    sizes = ", ".join(f"{r}×{r}" for r in drawn)
    return [
        Picture(
            torch.cat(rows),
            columns,
            f"{len(rows)} rows of the same {columns} samples at {sizes} pixels",
            f"The first {columns} at every level, as they grow: {sizes}, enlarged to the same "
            "size.",
        )
    ]


def upscalings(subjects: Sequence[Subject]) -> list[Block]:
    """Test images made small, drawn again, beside the truth."""
    missing: list[Block] = []
    blocks: list[Block] = []
    found = list(of_each(subjects, lambda subject: subject.upscaled, missing))
    for subject, enlarged in found:
        for one in enlarged:
            blocks.append(_upscaling(subject, one, len(subjects) > 1))
    if found:
        blocks.append(Text("Images of your own, averaged down first:"))
        level = found[0][1][0].level
        options = ("photo.png", "--level", level, "--reduce", "--out", "upscaled")
        blocks.append(Code("\n".join(command(s, "upscale", *options) for s, _ in found)))
    return [*blocks, *missing]


def _upscaling(subject: Subject, one: Enlarged, named: bool) -> Picture:
    count, side = len(one.truth), one.truth.shape[-1]
    inputs = enlarge(one.inputs, side // one.level)
    cells = torch.stack((inputs, *one.draws, one.truth), 1).flatten(0, 1)
    heads = [f"{one.level}×{one.level}", *(f"draw {k + 1}" for k in range(len(one.draws))), "truth"]
    whose = f"{subject.name}: from" if named else "From"
    return Picture(
        cells,
        len(heads),
        f"{count} test images at {one.level}×{one.level} pixels, {len(one.draws)} images of "
        f"{side}×{side} that {subject.name} draws for each, and the image itself",
        f"{whose} {one.level}×{one.level} to {side}×{side}: of the first {one.among:,} test images "
        f"the {count} that vary most. Every draw averages to its input, up to rounding.",
        heads,
    )


def neighbours(subjects: Sequence[Subject]) -> list[Block]:
    """Samples beside the training images that are nearest to them."""
    missing: list[Block] = []
    blocks: list[Block] = []
    found = list(of_each(subjects, lambda subject: subject.neighbours, missing))
    for subject, (drawn, nearest) in found:
        cells = torch.cat((drawn[:, None], nearest), 1)
        count = nearest.shape[1]
        whose = f"{subject.name}: " if len(subjects) > 1 else ""
        blocks.append(
            Picture(
                cells.flatten(0, 1),
                count + 1,
                f"{len(drawn)} samples of {subject.name}, each beside its {count} nearest "
                "training images",
                f"{whose}The first {len(drawn)} samples at temperature 1 and the training images "
                f"nearest to each, among {len(subject.training):,} of {subject.training.name}, by "
                "Euclidean distance of the pixels.",
                ["sample", "nearest", *(f"{k}." for k in range(2, count + 1))],
            )
        )
    if found:
        drawn, nearest = found[0][1]
        options = ("--n", len(drawn), "--neighbours", nearest.shape[1], "--out", "neighbours.png")
        lines = [command(s, "sample", *options, takes=["data"]) for s, _ in found]
        blocks.append(Code("\n".join(lines)))
    return [*blocks, *missing]

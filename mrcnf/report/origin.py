"""A page's sections on where things come from: configuration, data, versions, commands."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from mrcnf import runtime
from mrcnf.report import compare
from mrcnf.report.document import Block, Code, Table, Text
from mrcnf.report.numbers import of_each, swatch
from mrcnf.report.subject import Subject
from mrcnf.runs import checkpoint, config
from mrcnf.runs.config import Config


def configuration(subjects: Sequence[Subject]) -> list[Block]:
    """What differs from the defaults, or between the runs; and every value, folded away."""
    blocks: list[Block] = [_differences(subjects)] if len(subjects) > 1 else []
    for subject in subjects:
        for resolution, folder in checkpoint.find_levels(subject.run).items():
            path = folder / checkpoint.CONFIG
            if not path.is_file():
                blocks.append(Text(f"Level {resolution} has no {checkpoint.CONFIG}.", aside=True))
                continue
            if len(subjects) == 1:
                blocks.append(_own_settings(resolution, config.load(path)))
            whose = f"{subject.name}, level" if len(subjects) > 1 else "Level"
            blocks.append(Code(path.read_text(), f"{whose} {resolution}: every setting"))
    return blocks


def _own_settings(resolution: int, settings: Config) -> Table:
    ours, defaults = (
        dict(compare.dotted(config.to_table(given))) for given in (settings, Config())
    )
    rows = [
        (key, _value(value), _value(defaults.get(key)))
        for key, value in ours.items()
        if value != defaults.get(key) and key != "name"
    ]
    title = f"Level {resolution}: settings that are not the defaults"
    return Table(("", "value", "default"), rows, caption=title, words=[1, 2])


def _differences(subjects: Sequence[Subject]) -> Block:
    rows = compare.compare([subject.run for subject in subjects])
    by_folder = {subject.run: subject for subject in subjects}
    told = [row for row in rows if row.settings]
    if not told:
        return Text("The runs' configurations do not differ.")
    return Table(
        ("", "level", "otherwise than the first run that has the level"),
        [
            (
                by_folder[row.run].name,
                f"{row.resolution}",
                ", ".join(f"{key} = {_value(value)}" for key, value in row.settings.items()),
            )
            for row in told
        ],
        words=[2],
        swatches=[swatch(by_folder[row.run]) for row in told],
        caption="What differs between the configurations",
    )


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else "“”" if value == "" else str(value)


def provenance(subjects: Sequence[Subject], page: str) -> list[Block]:
    """Data and their digests, versions, and the commands that make all of it again.

    Args:
        page: the command line of the page itself.
    """
    rows: list[Sequence[str]] = []
    for subject in subjects:
        rows += _data(subject)
    blocks: list[Block] = [
        Table(
            ("", "images", "sha256 of shape and pixels"),
            rows,
            words=[2],
            caption="The images: what training noted, and what is at hand",
        )
    ]
    missing: list[Block] = []
    for images in (attrgetter("test"), attrgetter("training")):
        list(of_each(subjects, images, missing))
    blocks += [
        Text(block.words.replace("Not shown, because", "Not at hand:"), aside=True)
        for block in missing
        if isinstance(block, Text)
    ]
    blocks.append(_versions(subjects))
    blocks.append(Text("Each level trains again from its own configuration; and this page:"))
    lines = [
        shlex.join(["mrcnf", "train", str(folder / checkpoint.CONFIG), "--level", str(resolution),
                    "--out", "again"])
        for subject in subjects
        for resolution, folder in checkpoint.find_levels(subject.run).items()
    ]  # fmt: skip
    blocks.append(Code("\n".join([*lines, page])))
    return blocks


def _data(subject: Subject) -> list[Sequence[str]]:
    trained: dict[tuple[str, str], list[str]] = {}
    for resolution, level in subject.levels.items():
        trained.setdefault((level["data_name"], level["data"]), []).append(str(resolution))
    rows: list[Sequence[str]] = [
        (f"{subject.name}, trained levels {', '.join(levels)}", name, digest)
        for (name, digest), levels in trained.items()
    ]
    for (_, images), what in (
        *((found, "test") for found in of_each([subject], lambda s: s.test, [])),
        *((found, "training") for found in of_each([subject], lambda s: s.training, [])),
    ):
        first = "the first " if what == "training" and len(images) == _most(subject) else ""
        rows.append(
            (f"{subject.name}, {what} images at hand",
             f"{first}{len(images):,} of {images.name}", images.sha256)
        )  # fmt: skip
    return rows


def _most(subject: Subject) -> int:
    return subject.limits.training_images


def _versions(subjects: Sequence[Subject]) -> Table:
    now = runtime.versions()
    then = {
        f"{subject.name}, level {resolution}": level.get("versions", {})
        for subject in subjects
        for resolution, level in subject.levels.items()
    }
    names = list(now)
    rows = [("this page", *now.values())]
    rows += [
        (f"training of {what}", *(found.get(name, "not noted") for name in names))
        for what, found in then.items()
    ]
    return Table(("", *names), rows, caption="Versions")

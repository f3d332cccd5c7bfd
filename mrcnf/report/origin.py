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
        read, folded = {}, []
        for resolution, folder in checkpoint.find_levels(subject.run).items():
            path = folder / checkpoint.CONFIG
            if not path.is_file():
                blocks.append(Text(f"Level {resolution} has no {checkpoint.CONFIG}.", aside=True))
                continue
            read[resolution] = dict(compare.dotted(config.to_table(config.load(path))))
            whose = f"{subject.name}, level" if len(subjects) > 1 else "Level"
            folded.append(Code(path.read_text(), f"{whose} {resolution}: every setting"))
        if len(subjects) == 1 and read:
            blocks.append(_own_settings(read))
        blocks += folded
    return blocks


def _own_settings(read: dict[int, dict[str, Any]]) -> Table:
    """Settings of any level that are not the defaults, a column for each level."""
    defaults = dict(compare.dotted(config.to_table(Config())))
    keys = [key for key in next(iter(read.values())) if key != "name"]
    rows = [
        (key, *(_value(settings.get(key)) for settings in read.values()), _value(defaults.get(key)))
        for key in keys
        if any(settings.get(key) != defaults.get(key) for settings in read.values())
    ]
    return Table(
        ("", *(f"level {resolution}" for resolution in read), "default"),
        rows,
        caption="Settings that are not the defaults",
    )


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
    blocks: list[Block] = [
        Table(
            ("", "", "sha256 of shape and pixels"),
            [row for subject in subjects for row in _data(subject, len(subjects) > 1)],
            words=[1, 2],
            caption="The images that training noted, and those that are at hand now",
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


def _data(subject: Subject, named: bool) -> list[Sequence[str]]:
    whose = f"{subject.name}, " if named else ""
    trained: dict[tuple[str, str], list[str]] = {}
    for resolution, level in subject.levels.items():
        trained.setdefault((level["data_name"], level["data"]), []).append(str(resolution))
    rows: list[Sequence[str]] = [
        (f"{whose}trained level {', '.join(levels)}", name, digest)
        for (name, digest), levels in trained.items()
    ]
    for what in ("test", "training"):
        for _, images in of_each([subject], attrgetter(what), []):
            count = f"{len(images):,} of {images.name}"
            rows.append((f"{whose}{what} images at hand", count, images.sha256))
    return rows


def _versions(subjects: Sequence[Subject]) -> Table:
    """Of the page, and of each training that noted its own."""
    now = runtime.versions()
    then: dict[tuple[str, ...], list[str]] = {}
    for subject in subjects:
        for resolution, level in subject.levels.items():
            found = level.get("versions", {})
            key = tuple(found.get(name, "not noted") for name in now)
            whose = f"{subject.name}, " if len(subjects) > 1 else ""
            then.setdefault(key, []).append(f"{whose}level {resolution}")
    rows = [(f"training of {', '.join(what)}", *found) for found, what in then.items()]
    return Table(("", *now), [("this page", *now.values()), *rows], caption="Versions")

"""Images that are read a part at a time: what a data set is before anybody asks for its pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np

from mrcnf.data.reduce import halve

PART = 2**24
"""Bytes that are read together where a source leaves the choice."""


@dataclass(frozen=True, eq=False)
class Stream:
    """Images of one shape, in order, uint8.

    `shape` is (N, C, H, W) of all of them. `parts(start)` yields arrays (n, C, H, W), with the
    images from `start` on. `groups`: int64 (N,), the photograph of each image, or None. `files`:
    what they are read from, as far as a change of it would matter.
    """

    shape: tuple[int, int, int, int]
    parts: Callable[[int], Iterator[np.ndarray]]
    groups: np.ndarray | None = None
    files: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return self.shape[0]

    def array(self) -> np.ndarray:
        """All of them in memory: uint8 (N, C, H, W)."""
        whole, done = np.empty(self.shape, np.uint8), 0
        for part in self.parts(0):
            whole[done : done + len(part)] = part
            done += len(part)
        return whole

    def first(self, limit: int | None) -> Stream:
        """The first that many of them; all for None."""
        count = len(self) if limit is None else min(limit, len(self))

        def parts(start: int) -> Iterator[np.ndarray]:
            left = count - start
            source = self.parts(start) if left > 0 else iter(())
            for part in source:
                yield part[:left]
                left -= len(part)
                if left <= 0:
                    return

        groups = None if self.groups is None else self.groups[:count]
        return replace(self, shape=(count, *self.shape[1:]), parts=parts, groups=groups)

    def chosen(self, rows: np.ndarray) -> Stream:
        """Those of `rows`, bool (N,), in their order."""
        places = np.flatnonzero(rows)

        def parts(start: int) -> Iterator[np.ndarray]:
            at = int(places[start]) if start < len(places) else len(self)
            for part in self.parts(at) if at < len(self) else ():
                kept = part[rows[at : at + len(part)]]
                at += len(part)
                if len(kept):
                    yield kept

        groups = None if self.groups is None else self.groups[rows]
        return replace(self, shape=(len(places), *self.shape[1:]), parts=parts, groups=groups)

    def halved(self, resolution: int | None, where: Path) -> Stream:
        """All of them averaged to `resolution`, see `reduce.halve`, whose errors this raises."""
        none = halve(np.empty((0, *self.shape[1:]), np.uint8), resolution, where)

        def parts(start: int) -> Iterator[np.ndarray]:
            return (halve(part, resolution, where) for part in self.parts(start))

        return replace(self, shape=(len(self), *none.shape[1:]), parts=parts)


def of_array(pixels: np.ndarray, groups: np.ndarray | None = None) -> Stream:
    """Images that are in memory already, (N, C, H, W)."""
    step = max(1, PART // max(1, pixels[:1].size))

    def parts(start: int) -> Iterator[np.ndarray]:
        return (pixels[i : i + step] for i in range(start, len(pixels), step))

    count, channels, height, width = pixels.shape
    return Stream((count, channels, height, width), parts, groups)


def chained(streams: Sequence[Stream]) -> Stream:
    """One after another, without groups; their images have one shape."""
    ends = list(accumulate(map(len, streams)))

    def parts(start: int) -> Iterator[np.ndarray]:
        for stream, end in zip(streams, ends, strict=True):
            if start < end:
                yield from stream.parts(max(0, start - (end - len(stream))))

    shape = (ends[-1], *streams[0].shape[1:])
    return Stream(shape, parts, files=tuple(file for s in streams for file in s.files))

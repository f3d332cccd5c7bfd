"""The images of each step, on the device: from memory, or gathered ahead from a file."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from mrcnf.data.datasets import Images
from mrcnf.training.order import EpochOrder

AHEAD = 2
"""Steps whose images are read while the device works on an earlier one."""


class Batches:
    """This process's pieces of each step's batch; of images in a file, it reads no others.

    Args:
        images: to train on.
        order: of the images; here alone from now on.
        pieces: of a batch, in all processes.
        mine: those that this process wants.
        device: where to.
        pixels: of images in memory, all of them on the device already.
    """

    def __init__(
        self,
        images: Images,
        order: EpochOrder,
        pieces: int,
        mine: range,
        device: torch.device,
        pixels: Tensor | None = None,
    ) -> None:
        self.images, self.order, self.pieces, self.mine = images, order, pieces, mine
        self.device = device
        if pixels is None and not images.mapped:
            pixels = images.pixels.to(device)
        self.pixels = pixels
        self.waiting: deque[tuple[int, Future[list[Tensor]]]] = deque()
        self.reader: ThreadPoolExecutor | None = None

    def of_step(self, step: int) -> Iterator[tuple[int, Tensor]]:
        """Number and images of each piece, uint8 (n, C, H, W) on the device.

        Raises:
            UserError: the file has changed.
        """
        if self.pixels is not None:
            parts = self.order.indices(step).chunk(self.pieces)
            for piece in self.mine:
                yield piece, self.pixels[parts[piece].to(self.device)]
            return
        for piece, part in zip(self.mine, self._read(step), strict=True):
            yield piece, part.to(self.device, non_blocking=True)

    def take(self, chosen: Tensor) -> Tensor:
        """Images by number, on the device."""
        if self.pixels is not None:
            return self.pixels[chosen.to(self.device)]
        return self.images.take(chosen.cpu()).to(self.device)

    def _read(self, step: int) -> list[Tensor]:
        if self.reader is None:
            self.reader = ThreadPoolExecutor(1, "images", initializer=self._begin)
        if self.waiting and self.waiting[0][0] != step:
            self.waiting.clear()
        for later in range(step + len(self.waiting), step + AHEAD + 1):
            self.waiting.append((later, self.reader.submit(self._gather, later)))
        return self.waiting.popleft()[1].result()

    def _begin(self) -> None:
        if self.device.type == "cuda":  # or page-locked memory would be taken through GPU 0
            torch.cuda.set_device(self.device)

    def _gather(self, step: int) -> list[Tensor]:
        parts = self.order.indices(step).chunk(self.pieces)
        pinned = self.device.type == "cuda"
        return [self.images.take(parts[piece], pinned=pinned) for piece in self.mine]

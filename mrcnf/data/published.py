"""The published data sets: what their files are called, where they lie, and fetching them."""

import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mrcnf.data.formats import open_npz, read_cifar, read_idx, read_mat
from mrcnf.data.streams import Stream, chained, of_array
from mrcnf.errors import UserError


@dataclass(frozen=True)
class Published:
    """One published set: how its files are read, what they hold, where they lie or come from."""

    read: Callable[[Path], np.ndarray | Stream]
    shape: tuple[int, int, int]  # (C, H, W)
    folders: tuple[str, ...]  # below the root; downloaded files go to the first
    files: Mapping[str, tuple[str, ...]]  # by split; NAME.gz may also lie there as NAME
    url: str = ""  # {} stands for the file; "" means that there is no open one
    md5: Mapping[str, str] = field(default_factory=dict)  # by split, of what is at the URL
    remedy: str = ""


def _imagenet(size: int) -> Published:
    train = tuple(f"train_data_batch_{i}.npz" for i in range(1, 11))
    files = {"train": train, "test": ("val_data.npz",), "val": ("val_data.npz",)}
    remedy = "an account at https://image-net.org gives access to the downsampled images (npz)"
    folders = (f"imagenet{size}", "")
    return Published(lambda path: open_npz(path)[0], (3, size, size), folders, files, remedy=remedy)


_CIFAR = "https://www.cs.toronto.edu/~kriz/cifar-{}-python.tar.gz"
PUBLISHED: Mapping[str, Published] = {
    "cifar10": Published(
        read_cifar, (3, 32, 32), ("cifar-10-batches-py", ""),
        {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
        _CIFAR.format(10), dict.fromkeys(("train", "test"), "c58f30108f718f92721af3b95e74349a"),
    ),
    "cifar100": Published(
        read_cifar, (3, 32, 32), ("cifar-100-python", ""), {"train": ("train",), "test": ("test",)},
        _CIFAR.format(100), dict.fromkeys(("train", "test"), "eb9058c3a382ffc7106e4002c42a8d85"),
    ),
    "svhn": Published(
        read_mat, (3, 32, 32), ("", "svhn"),
        {"train": ("train_32x32.mat",), "test": ("test_32x32.mat",)},
        "http://ufldl.stanford.edu/housenumbers/{}",
        {"train": "e26dedcc434d2e4c54c9b2d4a06d8373", "test": "eb5a983be6a315427106f1b164d9cef3"},
    ),
    "fashion-mnist": Published(
        read_idx, (1, 28, 28), ("fashion-mnist", "", "/usr/share/datasets/fashion-mnist"),
        {"train": ("train-images-idx3-ubyte.gz",), "test": ("t10k-images-idx3-ubyte.gz",)},
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/{}",
        {"train": "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "test": "bef4ecab320f06d8554ea6380940ec79"},
        "apt-get install dataset-fashion-mnist, or",
    ),
    "imagenet32": _imagenet(32),
    "imagenet64": _imagenet(64),
}


def stream(
    name: str, split: str, root: Path, resolution: int | None, limit: int | None, download: bool
) -> Stream:
    """One split of the published set `name`, a key of `PUBLISHED`.

    `root`, `resolution`, `limit` and `download` as in `mrcnf.data.load`; files after those that
    `limit` needs are not opened.

    Raises UserError for a split that the set does not have, and for files that are missing,
    damaged or another set's.
    """
    source, parts, count = PUBLISHED[name], [], 0
    if split not in source.files:
        raise UserError(f"{name} has no split '{split}'; choose {' or '.join(source.files)}")
    for file in source.files[split]:
        path, url = _find(source, file, root), source.url.format(file)
        if path is None and download and url:
            _download(url, source.md5[split], root, source.folders[0])
            path = _find(source, file, root)
        if path is None:
            places = ", ".join(str(root / folder) for folder in source.folders)
            fetch = f"get {url} or give --data.download true (needs pip install 'mrcnf[data]')"
            raise UserError(f"{name}: {file} was not found in {places}; {source.remedy} "
                            f"{fetch if url else ''}; --data.root DIR or MRCNF_DATA say where")
        found = source.read(path)
        part = found if isinstance(found, Stream) else of_array(found)
        if part.shape[1:] != source.shape:
            raise UserError(f"{path}: images are (C,H,W) = {part.shape[1:]}, not {source.shape}; "
                            f"replace it with {name}'s own file")
        parts.append(part.first(limit and limit - count).halved(resolution, path))
        count += len(parts[-1])
        if count == limit:
            break
    return chained(parts)


def _find(source: Published, file: str, root: Path) -> Path | None:
    spots = (root / f / n for f in source.folders for n in (file, file.removesuffix(".gz")))
    return next((spot for spot in spots if spot.is_file()), None)


_FILTER: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


def _download(url: str, md5: str, root: Path, folder: str) -> None:
    try:
        import pooch  # an extra, and here alone
    except ImportError as error:
        raise UserError("downloading needs pooch: pip install 'mrcnf[data]'") from error
    packed = url.endswith(".tar.gz")
    target = root if packed else root / folder
    try:
        file = url.rpartition("/")[2]
        got = pooch.retrieve(url, known_hash=f"md5:{md5}", fname=file, path=target)
        if packed:
            with tarfile.open(got) as archive:
                archive.extractall(root, filter="data")
    except Exception as error:  # network, disk and checksum have nothing narrower in common
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{url} could not be downloaded ({reason[:200]}); "
                        f"fetch it by other means into {target}") from error

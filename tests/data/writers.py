"""Writers of the published formats, independent of the readers, for small data sets."""

import pickle
import struct
import zlib

import numpy as np


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def python2_batch(images):
    """A CIFAR batch as Python 2 wrote them: protocol 2, NumPy's old module names, byte strings."""
    shape = b"M" + struct.pack("<H", len(images)) + b"M\x00\x0c\x86"
    return (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\n"
        b"q\x04K\x00\x85U\x01b\x87Rq\x05(K\x01" + shape + b"cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01"
        b"\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<I", images.size) + images.tobytes()
        + b"tbU\tfilenamesr\x08\x00\x00\x00]q\x09(U\x05a.pngeu."
    )


def python3_batch(protocol):
    return lambda b: pickle.dumps({b"data": b.reshape(len(b), -1), "labels": [1]}, protocol)


def python3_text_keys(batch):
    return pickle.dumps({"data": batch.reshape(len(batch), -1)}, 2)


def write_cifar(root, folder, names, count=3, writer=python2_batch):
    images = [random_images(count, 3, 32, 32, seed=i) for i, _ in enumerate(names)]
    (root / folder).mkdir(parents=True)
    for name, batch in zip(names, images, strict=True):
        (root / folder / name).write_bytes(writer(batch))
    return np.concatenate(images)


def idx(images):
    return struct.pack(">4I", 0x803, *images.shape) + images.tobytes()


def mat_element(kind, content):
    if len(content) <= 4:
        return struct.pack("<HH", kind, len(content)) + content.ljust(4, b"\0")
    padding = b"" if kind == 15 else b"\0" * (-len(content) % 8)
    return struct.pack("<2I", kind, len(content)) + content + padding


def mat_matrix(name, kind, array):
    return mat_element(
        14,
        mat_element(6, struct.pack("<2I", 9, 0))
        + mat_element(5, struct.pack(f"<{array.ndim}i", *array.shape))
        + mat_element(1, name)
        + mat_element(kind, array.tobytes(order="F")),
    )


def mat(images, compress=True):
    """`X` (H, W, C, N) after `y`, as SVHN's files but in the harder order."""
    parts = [mat_matrix(b"labels", 2, np.ones((len(images), 1), np.uint8)),
             mat_matrix(b"X", 2, images.transpose(2, 3, 1, 0))]
    if compress:
        parts = [mat_element(15, zlib.compress(part)) for part in parts]
    return b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM" + b"".join(parts)

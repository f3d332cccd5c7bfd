"""PNG and WebP: the sizes of the files that they write."""

import pytest
import torch
from PIL import Image

from mrcnf.data.imagefile import read_image
from mrcnf.measure.classical import classical_bits

FLAT = torch.full((5, 1, 16, 16), 77, dtype=torch.uint8)
RANDOM = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)


@pytest.mark.parametrize("pixels", [FLAT, RANDOM], ids=["flat", "random"])
@pytest.mark.parametrize(
    ("form", "options"),
    [("PNG", {"optimize": True}), ("WEBP", {"lossless": True, "quality": 100, "method": 6})],
)
def test_classical_bits_are_the_sizes_of_files(tmp_path, pixels, form, options):
    def size(image):
        array = image.permute(1, 2, 0).numpy()
        picture = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
        path = tmp_path / f"image.{form.lower()}"
        picture.save(path, **options)
        back = read_image(path, channels=image.shape[0])
        assert torch.equal(back, image)  # without loss
        return 8 * path.stat().st_size

    alone = sum(size(image) for image in pixels) / pixels.numel()
    assert classical_bits(pixels, form, mosaic=False) == pytest.approx(alone)
    columns = 3  # the squarest arrangement of five, with one white cell
    rows = [torch.cat([*pixels[:3]], 2),
            torch.cat([*pixels[3:], torch.full_like(pixels[0], 255)], 2)]  # fmt: skip
    assert rows[0].shape[2] == columns * 16
    mosaic = size(torch.cat(rows, 1)) / pixels.numel()
    assert classical_bits(pixels, form, mosaic=True) == pytest.approx(mosaic)
    if pixels is FLAT:
        assert mosaic < alone < 3
    else:
        assert 8 < mosaic < 13 and alone > 8

"""Images: where they come from, single files, averages."""

from mrcnf.data.datasets import Images, load

__all__ = ["Images", "load"]

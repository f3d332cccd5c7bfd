"""`python -m mrcnf`, for torchrun."""

from mrcnf.cli import main

main()

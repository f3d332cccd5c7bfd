"""`python -m mrcnf`, for torchrun."""

from mrcnf.cli.commands import main

main()

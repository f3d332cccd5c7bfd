#!/bin/sh
# The benchmark's CUDA rows on a machine that has only PyTorch, torchdiffeq and safetensors;
# run from the repository's root. Results go to $OUT, or here.
#
#     sh benchmarks/gpu.sh            # everything, some minutes
#     sh benchmarks/gpu.sh --quick    # first, to see that it runs
set -eu
out=${OUT:-.}
python3 -m benchmarks --device cuda --json "$out/results-cuda.json" --plot "$out/scale-cuda.png" "$@"

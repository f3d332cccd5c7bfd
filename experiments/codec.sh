#!/bin/sh
# The codec, measured: the tables and figures of README.md, with CIFAR-10 and photos128 in DIR and any
# photograph of 512×512 pixels or more. One core, half an hour to an hour; what is there already is not measured again.
#
#     sh experiments/codec.sh DIR PHOTO
set -eu
dir=$1 photo=$2 out=${OUT:-runs/codec} run=experiments/models/cifar10
export OMP_NUM_THREADS=1
mkdir -p "$out"
measure() {
    name=$1
    shift
    test -s "$out/$name.json" || python experiments/codec.py "$run" "$@" --json "$out/$name.part"
    test -s "$out/$name.json" || mv "$out/$name.part" "$out/$name.json"
}
measure cifar10 cifar10 --root "$dir"
measure steps cifar10 --root "$dir" --limit 60 --steps 8 16 32 64 128
measure one cifar10 --root "$dir" --limit 1
measure ten cifar10 --root "$dir" --limit 10
measure thousand cifar10 --root "$dir" --limit 1000 --steps 16
measure crop "npz:$dir/photos128" --every 97 --limit 1
measure crops "npz:$dir/photos128" --every 97 --limit 6 --steps 32
measure sizes "$photo" --sides 64 128 256 512 --steps 32
measure portable cifar10 --root "$dir" --limit 20 --steps 32 --portable
measure other cifar10 --root "$dir" --limit 20 --steps 32
python experiments/codec_oracle.py "$run" cifar10 --root "$dir" --limit 12 --sigma 0.02 0.005 --steps 16 32 64
python experiments/codec_figures.py "$out"

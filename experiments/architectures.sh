#!/bin/sh
# One resolution, a split under every shuffle, or a wavelet pyramid of two or three levels: what is
# each worth with as many parameters and as many core-minutes? Trains the rows on CIFAR-10 (in DIR)
# and measures them; then the tables and the figures.
#
#     sh experiments/architectures.sh DIR [ROW...]
#
# What is done is left alone, what was interrupted goes on. Without names it runs all rows.
# OUT (runs/architectures) is where runs and numbers go; SIZE=gpu takes the GPU's rows.
set -eu
dir=$1; shift
out=${OUT:-runs/architectures} size=${SIZE:-cpu}
if [ "$size" = gpu ]; then
    recipe=experiments/architectures-gpu.toml
else
    recipe=experiments/architectures.toml
    export OMP_NUM_THREADS=1
fi
[ $# -gt 0 ] || set -- $(sh "experiments/architectures-rows.sh" "$size")
for row; do
    settings=$(sh "experiments/architectures-rows.sh" "$size" "$row")
    mrcnf train "$recipe" --resume --data.root "$dir" --out "$out/$row" $settings
    case $row in continuous-*)
        # What its files are small by.
        [ -e "$out/$row/level-32/codec.safetensors" ] ||
            mrcnf calibrate "$out/$row" --steps 200 data.root="$dir" ;;
    esac
    python -m experiments.architectures "$out/$row" --root "$dir"
done
# Whether the attack is a real one: its strength by steps, and through another row.
for pair in coupling-one:coupling-split coupling-split:coupling-one coupling-wavelet-2:coupling-one \
    continuous-wavelet-3:continuous-one; do
    run=$out/${pair%:*} other=$out/${pair#*:}
    [ ! -e "$run/measured.json" ] || [ ! -e "$other/measured.json" ] ||
        python -m experiments.architectures "$run" --root "$dir" --parts controls --transfer "$other"
done
python -m experiments.architectures_table "$out" --figures docs

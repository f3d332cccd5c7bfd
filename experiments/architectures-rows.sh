#!/bin/sh
# The rows of architectures.sh: the names of all of them, or what one of them sets.
#     sh experiments/architectures-rows.sh SIZE [ROW]      SIZE is cpu or gpu
# Those that end in -adversarial are trained on attacked images, for as long. The CPU's steps are six
# core-minutes by architectures_steps.py, a pyramid's shared out over its levels; level 32 of two
# levels is the same flow as that of three.
set -eu
matching="flow.kind=continuous train.objective=flow-matching"
# Regularised less, a field trained through the ODE learns to exploit its coarse steps.
through="flow.kind=continuous flow.splits=2 train.kinetic=0.05 train.frobenius=0.1"
coarse=64    # images in a batch of the coarser levels
[ "$1" = cpu ] || coarse=256
two="model.resolutions=[16,32] level.16.train.batch=$coarse"
three="model.resolutions=[8,16,32] level.8.train.batch=$coarse level.16.train.batch=$coarse"
sharper="level.16.train.times_centre=-1.5"    # the base's times, of pixels that average many
attacks="train.attack_share=0.5 train.attack_epsilon=2 train.attack_steps=3 train.warmup=50"
cpu() {
    case $1 in
        coupling-one-adversarial) echo $(cpu coupling-one) $attacks train.steps=207 ;;
        coupling-split-adversarial) echo $(cpu coupling-split) $attacks train.steps=993 ;;
        coupling-wavelet-2-adversarial) echo $(cpu coupling-wavelet-2) $attacks \
            level.16.train.steps=237 level.32.train.steps=544 ;;
        continuous-one) echo $matching field.width=64 field.depth=4 train.steps=1010 ;;
        continuous-wavelet-2) echo $matching $two $sharper \
            level.16.field.width=40 level.16.field.depth=4 level.16.train.steps=1120 \
            level.32.field.width=48 level.32.field.depth=4 level.32.train.steps=2830 ;;
        continuous-wavelet-3) echo $matching $three $sharper level.8.train.times_centre=-1.5 \
            level.8.field.width=32 level.8.field.depth=2 level.8.train.steps=1770 \
            level.16.field.width=32 level.16.field.depth=3 level.16.train.steps=3230 \
            level.32.field.width=48 level.32.field.depth=4 level.32.train.steps=2830 ;;
        coupling-one) echo flow.couplings=9 field.width=48 train.steps=576 ;;
        coupling-wavelet-2) echo $two level.16.flow.couplings=8 level.16.train.steps=700 \
            level.32.flow.couplings=9 level.32.train.steps=1730 ;;
        coupling-wavelet-3) echo $three level.8.flow.couplings=3 level.8.train.steps=1090 \
            level.16.flow.couplings=4 level.16.train.steps=2000 \
            level.32.flow.couplings=9 level.32.train.steps=1730 ;;
        coupling-split) echo flow.splits=2 train.steps=3440 ;;
        coupling-split-*) echo flow.splits=2 flow.shuffle="${1#*-split-}" train.steps=3440 ;;
        continuous-split) echo $through field.width=46 field.depth=2 \
            train.learning_rate=4e-3 train.steps=271 ;;
        *) echo "there is no row $1" >&2; exit 2 ;;
    esac
}
gpu() {
    case $1 in
        *-adversarial) echo $(gpu "${1%-adversarial}") $attacks ;;
        continuous-one) echo $matching field.width=192 field.depth=9 ;;
        continuous-wavelet-2) echo $matching $two $sharper \
            level.16.field.width=128 level.16.field.depth=6 level.16.train.minutes=3 \
            level.32.field.width=192 level.32.field.depth=6 level.32.train.minutes=7 ;;
        continuous-wavelet-3) echo $matching $three $sharper level.8.train.times_centre=-1.5 \
            level.8.field.width=96 level.8.field.depth=3 level.8.train.minutes=1 \
            level.16.field.width=96 level.16.field.depth=6 level.16.train.minutes=2 \
            level.32.field.width=192 level.32.field.depth=6 level.32.train.minutes=7 ;;
        coupling-one) echo flow.couplings=6 field.width=192 ;;
        coupling-wavelet-2) echo $two level.16.flow.couplings=6 level.16.train.minutes=3 \
            level.32.flow.couplings=6 level.32.train.minutes=7 ;;
        coupling-wavelet-3) echo $three level.8.flow.couplings=2 level.8.train.minutes=1 \
            level.16.flow.couplings=4 level.16.train.minutes=2 \
            level.32.flow.couplings=6 level.32.train.minutes=7 ;;
        coupling-split) echo flow.splits=2 ;;
        coupling-split-*) echo flow.splits=2 flow.shuffle="${1#*-split-}" ;;
        continuous-split) echo $through field.width=192 field.depth=3 ;;
        *) echo "there is no row $1" >&2; exit 2 ;;
    esac
}
if [ $# -lt 2 ]; then
    for kind in continuous coupling; do echo $kind-one $kind-wavelet-2 $kind-wavelet-3; done
    for shuffle in "" -random -learned -entropy -context; do echo coupling-split$shuffle; done
    echo continuous-split
    for row in one split wavelet-2; do echo coupling-$row-adversarial; done
else
    "$1" "$2"
fi

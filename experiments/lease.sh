#!/bin/sh
# One part of a lease: train every level of a recipe at once, each in a process of its own, for
# some minutes; stop with checkpoints; evaluate when all are done. Repeat until it is.
#   sh experiments/lease.sh DIR MINUTES [RECIPE] [section.key=value...]
# DIR holds the published files; runs go to ./runs, or to $RUNS; what is worth keeping to $OUT.
# Where pip reaches no index, carry wheels of tyro, docstring-parser, typeguard and tomli-w.
set -eu
data=$1; minutes=$2; shift 2
recipe=experiments/cifar10-flow-matching.toml
case ${1:-} in *.toml) recipe=$1; shift ;; esac
name=$(basename "$recipe" .toml)
run=${RUNS:-runs}/$name
out=${OUT:-.}
mrcnf="python3 -m mrcnf"
for level in 32 16 8; do
    timeout --signal=TERM "${minutes}m" $mrcnf train "$recipe" --level $level --out "$run" \
        --resume --data.root "$data" "$@" 2> "$out/level-$level.log" &
done
wait
$mrcnf info "$run" | tee "$out/info.txt"
for level in 8 16 32; do
    cp "$run/level-$level/metrics.jsonl" "$out/metrics-$level.jsonl"
done
if grep -q unfinished "$out/info.txt"; then
    echo "not finished: run the same command again"
    exit
fi
$mrcnf evaluate "$run" --data.root "$data" --convergence --json "$out/evaluation.json"
$mrcnf sample "$run" --out "$out/samples.png"

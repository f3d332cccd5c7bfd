#!/bin/sh
# Which channels should leave first? A split coupling flow of CIFAR-10 (in DIR) under every shuffle and
# with a conditional prior, three seeds each, and a split continuous flow; then the table and the figure.
#
#     sh experiments/splits.sh DIR [WORKERS]
#
# Runs that are finished are left alone, those that were interrupted go on.
set -eu
dir=$1 workers=${2:-1} out=${OUT:-runs/splits}
export OMP_NUM_THREADS=1
rows() {
    for seed in 0 1 2; do
        for shuffle in none random learned entropy context; do
            echo "$out/$shuffle-$seed train.seed=$seed flow.shuffle=$shuffle"
        done
        # The order measured at the first step alone.
        echo "$out/entropy-once-$seed train.seed=$seed flow.shuffle=entropy flow.reorder_every=1000"
        echo "$out/conditional-$seed train.seed=$seed flow.prior=conditional"
    done
    # A step through the ODE costs more, so there are fewer; regularised less, the field learns to
    # exploit the errors of its coarse steps.
    echo "$out/continuous-0 flow.kind=continuous train.steps=200 train.learning_rate=4e-3" \
        "train.kinetic=0.05 train.frobenius=0.1"
}
rows | xargs -P "$workers" -L 1 mrcnf train experiments/splits.toml --resume --data.root "$dir" --out
python experiments/splits.py "$out" --root "$dir"
mrcnf entropy "$out/none-0" "$out/random-0" "$out/learned-0" "$out/entropy-0" "$out/context-0" \
    --data.root "$dir" --out docs/split-entropy.png

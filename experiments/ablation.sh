#!/bin/sh
# Train level 32 once per row, the same in all but what the row names, and print the table.
#   sh experiments/ablation.sh DIR [ROW...]     DIR holds CIFAR-10's published files
# A row that is trained already is not trained again; an interrupted one goes on.
set -eu
data=$1; shift
out=${OUT:-runs/ablation}
settings() {
    case $1 in
        default) ;;
        adam) echo train.optimizer=adam train.learning_rate=2e-3 ;;
        no-decay) echo train.weight_decay=0 ;;
        scaled) echo model.whiten=false ;;
        mixed-times) echo train.times=mixed ;;
        uniform-times) echo train.times=uniform ;;
        log-uniform-times) echo train.times=log-uniform ;;
        likelihood-times) echo train.times=likelihood ;;
        variational) echo model.dequantisation=variational ;;
        variance-preserving) echo field.path=variance-preserving ;;
        lattice) echo field.lattice=true ;;
        linear) echo train.schedule=linear ;;
        wide) echo field.width=64 train.steps=1560 train.evaluate_every=780 ;;
        no-average) echo train.ema=0 ;;
        float32) echo train.precision=float32 ;;
        batch-64) echo train.batch=64 train.steps=1300 ;;
        attention) echo field.attention=true field.depth=3 ;;
        u-shaped) echo field.scales=2 field.depth=1 field.width=64 ;;
        deep) echo field.depth=8 field.width=32 ;;
        # The default row trained on, in two ways.
        longer) echo train.init="$out/default" train.steps=1000 train.learning_rate=1e-3 ;;
        likelihood) echo train.init="$out/default" train.steps=80 train.learning_rate=1e-4 \
            train.objective=likelihood train.warmup=10 train.ema=0.95 train.evaluate_every=80 \
            train.precision=float32 train_solver.method=midpoint train_solver.steps=20 \
            train_solver.spacing=3 train.kinetic=0 train.frobenius=0 ;;
        *) echo "there is no row $1" >&2; exit 2 ;;
    esac
}
[ $# -gt 0 ] || set -- default variational mixed-times uniform-times log-uniform-times \
    likelihood-times adam no-decay scaled variance-preserving lattice linear wide no-average float32 batch-64 \
    attention u-shaped deep longer likelihood
runs=""
for row; do
    overrides=$(settings "$row")
    mrcnf train experiments/ablation.toml --level 32 --resume --out "$out/$row" \
        --data.root "$data" $overrides
    runs="$runs $out/$row"
done
mrcnf compare $runs --out "$out/curves.png"

#!/bin/sh
# Train all three levels once per row, by the settings of ablation.toml, and evaluate them together:
# what a level costs depends on where the noise and the pyramid put the bits, the sum does not.
#   sh experiments/dequantisation.sh DIR [ROW...]     DIR holds CIFAR-10's published files
set -eu
data=$1; shift
out=${OUT:-runs/dequantisation}
settings() {
    case $1 in
        uniform) ;;
        variational) echo model.dequantisation=variational ;;
        # The lattice is seen at early times, which logit-normal ones leave out.
        gaussian) echo model.dequantisation=gaussian train.times=mixed ;;
        gaussian-lattice) echo model.dequantisation=gaussian train.times=mixed \
            field.lattice=true ;;
        integer) echo model.pyramid=integer ;;
        integer-variational) echo model.pyramid=integer model.dequantisation=variational ;;
        *) echo "there is no row $1" >&2; exit 2 ;;
    esac
}
[ $# -gt 0 ] || set -- uniform variational integer integer-variational gaussian gaussian-lattice
for row; do
    overrides=$(settings "$row")
    for level in 32 16 8; do
        mrcnf train experiments/ablation.toml --level $level --resume --out "$out/$row" \
            --data.root "$data" train.evaluate_every=0 solver.steps=60 $overrides
    done
    mrcnf evaluate "$out/$row" --data.root "$data" --limit 512 \
        --json "$out/$row/evaluation.json"
done

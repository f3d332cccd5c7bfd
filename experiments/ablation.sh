#!/bin/sh
# Train level 32 once per row, the same in all but what the row names, and print the table.
#   sh experiments/ablation.sh DIR [ROW...]     DIR holds CIFAR-10's published files
# A row that is trained already is not trained again.
set -eu
data=$1; shift
out=${OUT:-runs/ablation}
settings() {
    case $1 in
        default) ;;
        adam) echo train.optimizer=adam train.learning_rate=2e-3 ;;
        scaled) echo model.whiten=false ;;
        uniform-times) echo train.times=uniform ;;
        log-uniform-times) echo train.times=log-uniform ;;
        likelihood-times) echo train.times=likelihood ;;
        no-average) echo train.ema=0 ;;
        float32) echo train.precision=float32 ;;
        batch-64) echo train.batch=64 train.steps=1300 ;;
        gaussian) echo model.dequantisation=gaussian ;;
        attention) echo field.attention=true field.depth=3 ;;
        u-shaped) echo field.scales=2 field.depth=1 field.width=64 ;;
        deep) echo field.depth=8 field.width=32 ;;
        *) echo "there is no row $1" >&2; exit 2 ;;
    esac
}
[ $# -gt 0 ] || set -- default adam scaled uniform-times log-uniform-times likelihood-times \
    no-average float32 batch-64 gaussian attention u-shaped deep
runs=""
for row; do
    overrides=$(settings "$row")
    [ -e "$out/$row/level-32/state.safetensors" ] ||
        mrcnf train experiments/ablation.toml --level 32 --out "$out/$row" --data.root "$data" $overrides
    runs="$runs $out/$row"
done
mrcnf compare $runs --out "$out/curves.png"

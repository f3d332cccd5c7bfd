#!/bin/sh
# Photographs of 128×128: levels 8, 16 and 32 on averages, then 64 and 128 on top, each starting
# from the weights of the level below it; a hundred minutes on one core. Then its bits on all test
# crops beside classical formats (extra `compare`), samples, and crops drawn again from 32×32.
#   sh experiments/photos128.sh DIR     DIR holds photos128, a folder of train.npz and test.npz
# What is trained already is not trained again; what was interrupted goes on.
set -eu
data=npz:$1/photos128
out=${OUT:-runs}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
mrcnf train experiments/photos128.toml --resume --out "$out/photos128" data.name="$data"
grow() { # from a run, to a level, in so many minutes
    mrcnf extend "$out/$1" --resolution "$2" --resume --out "$out/photos128-$2" \
        data.name="$data" train.crop=32 train.init="$out/$1" train.init_level=$(($2 / 2)) \
        train.schedule=linear train.minutes="$3"
}
grow photos128 64 27
grow photos128-64 128 56
[ -d "$out/photos128-half" ] ||
    mrcnf assemble "$out/photos128-128" --half --out "$out/photos128-half"
python experiments/against_files.py "$out/photos128-half" "$data" --tolerance 0.001 --sizes "$out/files-128.npz"
mrcnf sample "$out/photos128-half" --n 8 --seed 1 --out "$out/photos128-samples.png"
python - "$1/photos128/test.npz" "$out" << 'END'
import sys

import numpy as np
from PIL import Image

with np.load(sys.argv[1]) as archive:
    for number in (454, 466, 545):  # of Kodak's photographs, which are free to use
        Image.fromarray(archive["images"][number]).save(f"{sys.argv[2]}/crop-{number}.png")
END
mrcnf upscale "$out/photos128-half" "$out"/crop-*.png --level 32 --reduce --draws 3 --seed 1 \
    --out "$out/photos128-upscaled"

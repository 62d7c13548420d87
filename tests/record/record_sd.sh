#!/usr/bin/env bash
# Records tests/data/sd_*reference* with diffusers on the small stand-in files. From the root of the repository:
#   tests/record/record_sd.sh PROJECT_PYTHON TORCH_PYTHON
# PROJECT_PYTHON has requirements.txt, TORCH_PYTHON what reference_sd.py names. Recorded with the versions named there.
set -euo pipefail
project=$1 torch=$2 folder=$(mktemp -d) data=tests/data
trap 'rm -rf "$folder"' EXIT
PYTHONPATH=. "$project" -c "
import numpy as np, sys
from pathlib import Path
from ip_adapter.weights.dummy import MINIATURE, write_standins
write_standins(Path(sys.argv[1]))
write_standins(Path(sys.argv[1]) / 'second', MINIATURE, seed=1)
np.save('tests/data/sd_latents.npy', np.random.default_rng(7).standard_normal((2, 4, 9, 13), np.float32))
" "$folder"
control=control_v11f1p_sd15_depth/diffusion_pytorch_model.safetensors

record() {  # TASK FLAGS: two pictures, kept as sd_reference_TASK_0.png and _1.png
    "$torch" tests/record/reference_sd.py --sd "$folder/v1-5-pruned-emaonly.safetensors" \
        --vae "$folder/sd-vae-ft-mse/diffusion_pytorch_model.safetensors" \
        --image_encoder "$folder/IP-Adapter/image_encoder/model.safetensors" \
        --ip_adapter "$folder/IP-Adapter/ip-adapter_sd15.safetensors" \
        --img $data/input.png --latents $data/sd_latents.npy --H 72 --W 104 --sampling_steps 7 \
        --prompt "a red circle" --ip_scale 0.8 --output "$folder/$1" --threads 1 "${@:2}"
    for n in 0 1; do cp "$folder/$1/0000$n.png" "$data/sd_reference_$1_$n.png"; done
}

record image_variation --modules $data/sd_reference.npz
record image_to_image --ref_img $data/input.png --strength 0.6
record inpainting --ref_img $data/input.png --ref_mask $data/mask.png --strength 0.7 --paste_original
record controlnet --controlnet "$folder/$control" --control_image $data/hint.png --control_scale 0.9 \
    --control_start 0.1 --control_end 0.8 --modules "$folder/control.npz"
record two_controlnets --ref_img $data/input.png --ref_mask $data/mask.png --strength 1 --paste_original \
    --controlnet "$folder/$control" --control_image $data/hint.png --control_scale 0.9 \
    --controlnet "$folder/second/$control" --control_image $data/input.png --control_scale 0.4

# Of the ControlNet's modules only what sd_reference.npz does not hold.
"$torch" -c "
import numpy as np, sys
with np.load(sys.argv[1]) as file:
    np.savez_compressed('tests/data/sd_control_reference.npz',
                        **{name: file[name] for name in file if 'control' in name})
" "$folder/control.npz"

#!/usr/bin/env bash
# Records tests/data/sdxl_reference_* with diffusers on the small stand-in files. From the root of the repository:
#   tests/record/record_sdxl.sh PROJECT_PYTHON TORCH_PYTHON
# PROJECT_PYTHON has requirements.txt, TORCH_PYTHON what reference_sdxl.py names.
set -euo pipefail
project=$1 torch=$2 folder=$(mktemp -d) data=tests/data
trap 'rm -rf "$folder"' EXIT
PYTHONPATH=. "$project" -c "
import sys
from pathlib import Path
from ip_adapter.families import SDXL
from ip_adapter.weights.dummy import MINIATURE_XL, write_standins
write_standins(Path(sys.argv[1]), MINIATURE_XL, family=SDXL)
" "$folder"

record() {  # TASK FLAGS: two pictures, kept as sdxl_reference_TASK_0.png and _1.png
    "$torch" tests/record/reference_sdxl.py --base "$folder/sd_xl_base_1.0.safetensors" \
        --vae "$folder/sd-vae-ft-mse/diffusion_pytorch_model.safetensors" \
        --image_encoder "$folder/IP-Adapter/image_encoder/model.safetensors" \
        --ip_adapter "$folder/IP-Adapter/ip-adapter_sdxl.safetensors" \
        --img $data/input.png --latents $data/sd_latents.npy --H 72 --W 104 --sample_step 7 --head_channels 32 \
        --prompt "a red circle" --ip_scale 0.8 --output "$folder/$1" "${@:2}"
    for n in 0 1; do cp "$folder/$1/0000$n.png" "$data/sdxl_reference_$1_$n.png"; done
}

record image_variation
record controlnet --controlnet "$folder/controlnet-depth-sdxl-1.0/diffusion_pytorch_model.safetensors" \
    --control_image $data/hint.png

#!/usr/bin/env bash
# Records tests/data/sd_reference* with diffusers on the small stand-in files. From the root of the repository:
#   tests/record/record_sd.sh PROJECT_PYTHON TORCH_PYTHON
# PROJECT_PYTHON has requirements.txt, TORCH_PYTHON what reference_sd.py names. Recorded with the versions named there.
set -euo pipefail
project=$1 torch=$2 folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
PYTHONPATH=. "$project" -c "
import numpy as np, sys
from pathlib import Path
from ip_adapter.standins import write_sd_standins
write_sd_standins(Path(sys.argv[1]))
np.save('tests/data/sd_latents.npy', np.random.default_rng(7).standard_normal((2, 4, 9, 13), np.float32))
" "$folder"
"$torch" tests/record/reference_sd.py --sd "$folder/v1-5-pruned-emaonly.safetensors" \
    --vae "$folder/sd-vae-ft-mse/diffusion_pytorch_model.safetensors" \
    --image_encoder "$folder/IP-Adapter/image_encoder/model.safetensors" \
    --ip_adapter "$folder/IP-Adapter/ip-adapter_sd15.safetensors" \
    --img tests/data/input.png --latents tests/data/sd_latents.npy --H 72 --W 104 --sampling_steps 7 \
    --prompt "a red circle" --ip_scale 0.8 --output "$folder/pictures" --modules tests/data/sd_reference.npz --threads 1
for n in 0 1; do cp "$folder/pictures/0000$n.png" "tests/data/sd_reference_$n.png"; done

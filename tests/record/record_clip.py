"""Records what transformers' CLIPModel makes of a picture and two texts, on a small seeded stand-in.

From the root of the repository; the first Python has requirements.txt, the second torch, transformers and safetensors:

    PYTHONPATH=. PROJECT_PYTHON -c "
    import ldm; from pathlib import Path; from ip_adapter.weights.dummy import write_clip_standin as write
    write(Path('/tmp/clip.safetensors'))"
    TORCH_PYTHON tests/record/record_clip.py /tmp/clip.safetensors

Writes tests/data/clip_reference.npz: tokens (2, 77), image (1, E) of the seeded pixels below and text (2, E), of unit
length. Recorded with torch 2.13.0, transformers 5.23.0.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig


def main(path: str) -> None:
    """Build the model of the file's sizes, encode, save."""
    weights = load_file(path)
    text_width, image_width = (weights[f"{kind}_model.encoder.layers.0.layer_norm1.weight"].shape[0]
                               for kind in ("text", "vision"))
    layers = [sum(name.startswith(f"{kind}_model.encoder.layers.") and name.endswith("layer_norm1.weight")
                  for name in weights) for kind in ("text", "vision")]
    projection = weights["visual_projection.weight"].shape[0]
    # heads are 64 wide in texts, 16 in number in pictures; 49407 ends a text, which marks the pooled state
    text = CLIPTextConfig(hidden_size=text_width, num_hidden_layers=layers[0], num_attention_heads=text_width // 64,
                          intermediate_size=weights["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
                          projection_dim=projection, hidden_act="quick_gelu", eos_token_id=49407)
    image = CLIPVisionConfig(hidden_size=image_width, num_hidden_layers=layers[1], num_attention_heads=16,
                             intermediate_size=weights["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
                             projection_dim=projection, patch_size=14, image_size=224, hidden_act="quick_gelu")
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=image.to_dict(), projection_dim=projection))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"logit_scale"} and not unexpected, (missing, unexpected)
    tokens = np.full((2, 77), 49407)
    tokens[0, :6] = [49406, 320, 1125, 539, 320, 2368]  # a photo of a cat
    tokens[1, :4] = [49406, 736, 5988, 14]
    pixels = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    with torch.no_grad():
        out = model.eval()(input_ids=torch.from_numpy(tokens), pixel_values=torch.from_numpy(pixels))
    np.savez_compressed("tests/data/clip_reference.npz", tokens=tokens.astype(np.int32),
                        image=out.image_embeds.numpy(), text=out.text_embeds.numpy())


if __name__ == "__main__":
    main(sys.argv[1])

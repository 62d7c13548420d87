"""Pictures made while a training runs, always from the same pictures, captions and noise."""
from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ip_adapter.data.dataset import ImageTextDataset
from ip_adapter.generation import generate
from ip_adapter.images.saving import save_png
from ip_adapter.weights.loading import ImagePromptModel

GUIDANCE_SCALE = 7.5


class Validation:
    """Each row of a sheet: a picture, what is made of it alone, and what is made of it and its caption.

    What the frozen encoders give is computed once, so they may leave memory afterwards; the autoencoder must stay.

    Args:
        args: parsed flags of `ip_adapter.cli.training.training_parser`.
        model: the model that is trained.

    Raises:
        UserError: the data cannot be used.
    """

    def __init__(self, args: argparse.Namespace, model: ImagePromptModel):
        self.model, self.size, self.seed = model, args.image_size, args.seed
        self.folder = Path(args.output_path) / "validation"
        self.steps = args.validation_steps
        flag = "--validation_data" if args.validation_data else "--data_path"
        dataset = ImageTextDataset(args.validation_data or args.data_path, args.image_size, flag=flag)
        count = min(args.validation_count, len(dataset))
        rows = [dataset.sample(row, None).index for row in range(count)]
        self.pictures = [dataset.prompt(row) for row in rows]
        self.embeddings = [model.embed(picture) for picture in self.pictures]
        model.diffusion.set_size(self.size, self.size)
        self.empty = model.diffusion.condition([""])
        self.texts = [(self.empty, model.diffusion.condition([dataset.text(row)])) for row in rows]

    def __call__(self, step: int) -> None:
        """Write the sheet of a step, with the weights as they are now."""
        rows = []
        for n, (picture, embedding, texts) in enumerate(zip(self.pictures, self.embeddings, self.texts)):
            made = [generate(self.model, self.model.with_image([text, self.empty], embedding), [self.seed + n],
                             self.size, self.steps, GUIDANCE_SCALE)[0] for text in texts]
            # Cut out before it is resized: a picture prompt may be as narrow as it likes.
            shown = ImageOps.fit(picture, (self.size, self.size), Image.BICUBIC)
            rows.append(np.concatenate([np.asarray(shown), *made], 1))
        save_png(self.folder, Image.fromarray(np.concatenate(rows)), {"step": step}, f"step-{step}-{{:05d}}.png")

"""What the demo model's pictures show, judged by pixels (`drawn_world.look`), task by task, against what was asked."""
from __future__ import annotations

import functools
from typing import Iterable, Iterator

import numpy as np
from mindspore import Tensor
from PIL import Image

from ip_adapter.demo.scenes import (
    NEUTRAL,
    Scene,
    agreement,
    caption,
    draw,
    ground_caption,
    iou,
    look,
    other_ground,
    outline,
    random_scene,
    shape_mask,
)
from ip_adapter.demo.tasks import Task
from ip_adapter.generation import generate
from ip_adapter.images.charts import BLUE, ORANGE, Curve, chart
from ip_adapter.images.preprocess import hint_pixels, latent_mask, latent_pixels, paste
from ip_adapter.weights.loading import ImagePromptModel
from ldm.model import Control
from ldm.sampling.ddim import KeptRegion

SHEET_ROWS = 12
LINES = {"colour": (200, 40, 40), "ground": (40, 150, 60), "shape": BLUE, "both": ORANGE, "iou": ORANGE}


class DemoJudge:
    """Makes pictures of scenes nobody trained on, and counts what is right.

    Args:
        model: the demo model.
        size: side of the pictures.
        steps: denoising steps.
        guidance_scale: of classifier-free guidance.
        seed: scene n follows from seed and n; noise from both and the variation.
        count: scenes.
        variations: pictures of each.
    """

    def __init__(self, model: ImagePromptModel, size: int, steps: int, guidance_scale: float, seed: int, count: int,
                 variations: int):
        self.model, self.size, self.guidance_scale, self.seed = model, size, guidance_scale, seed
        self.steps, self.variations = steps, variations
        self.scenes = [random_scene(np.random.default_rng([seed, n])) for n in range(count)]
        model.diffusion.set_size(size, size)
        self.negative = model.diffusion.condition([NEUTRAL[1]])

    def on_other_ground(self, n: int) -> Scene:
        """Scene n, but for its ground."""
        return other_ground(self.scenes[n], np.random.default_rng([self.seed, n, 1]))

    def batches(self, task: Task) -> Iterator[np.ndarray]:
        """The pictures of each scene, (variations, size, size, 3) uint8."""
        model = self.model
        model.set_ip_scale(task.ip_scale)
        for n, scene in enumerate(self.scenes):
            picture = draw(scene, self.size)
            words = {"neutral": NEUTRAL[0], "caption": caption(scene),
                     "other ground": ground_caption(self.on_other_ground(n))}
            text = model.diffusion.condition([words[task.text]])
            sides = model.with_image([text, self.negative], model.embed(picture))
            seeds = [self.seed + n * self.variations + k for k in range(self.variations)]
            make = functools.partial(generate, model, sides, seeds, self.size, self.steps, self.guidance_scale,
                                     self._controls(task, scene))
            if not task.half:
                yield make()
                continue
            mask, clean = self._half(scene), model.diffusion.encode_image(latent_pixels(picture))
            made = make(keep=lambda noise, clean=clean, mask=mask: KeptRegion(
                clean, noise, latent_mask(mask), model.diffusion.add_noise))
            yield paste(made, picture, mask)

    def _controls(self, task: Task, scene: Scene) -> list:
        if not task.controlled:
            return []
        hint = self.model.diffusion.controlnets[0].embed_hint(Tensor(hint_pixels(outline(scene, self.size))))
        return [Control(hint, 1.0, {float(t) for t in self.model.diffusion.timesteps(self.steps)})]

    def _half(self, scene: Scene) -> np.ndarray:
        """(H, W) bool: the left or right half, where the shape's centre is."""
        left = np.arange(self.size) < self.size // 2
        return np.broadcast_to(left if scene.x < 0.5 else ~left, (self.size, self.size)).copy()

    def judge(self, task: Task, batches: Iterable[np.ndarray]) -> tuple:
        """Shares of what is right, and a sheet: each row a scene and what was made of it.

        Returns:
            Name -> share in [0, 1]: colour, ground, shape; for "other ground" both (ground as the text, colour as the
            picture has it); iou with the scene's shape; and chance_*, the same with the next scene in place of the
            right one.
        """
        counts, rows = {}, []
        for n, pictures in enumerate(batches):
            scene = self._expected(task, n)
            wrong = self._expected(task, (n + 1) % len(self.scenes))
            for picture in pictures:
                seen = look(Image.fromarray(picture))
                for prefix, expected in (("", scene), ("chance_", wrong)):
                    colour, ground, shape = agreement(expected, seen)
                    right = {"colour": colour, "ground": ground, "shape": shape}
                    if task.text == "other ground":
                        right = {"both": colour and ground, **right}
                    if task.controlled:
                        right["iou"] = iou(seen.mask, shape_mask(expected, self.size))
                    for name, value in right.items():
                        counts.setdefault(prefix + name, []).append(float(value))
            if n < SHEET_ROWS:
                rows.append(np.concatenate([np.asarray(draw(self.scenes[n], self.size)), *pictures], 1))
        return {name: float(np.mean(values)) for name, values in counts.items()}, np.concatenate(rows)

    def _expected(self, task: Task, n: int) -> Scene:
        return self.on_other_ground(n) if task.text == "other ground" else self.scenes[n]


def figure_curves(figures: dict) -> Image.Image:
    """The figures of several checkpoints over their steps, a chart for each task.

    Args:
        figures: step -> task -> what `DemoJudge.judge` gives, in the order of the steps.
    """
    charts = []
    for task, names in next(iter(figures.values())).items():
        curves = [Curve(list(figures), [of_step[task][name] for of_step in figures.values()], colour, name)
                  for name, colour in LINES.items() if name in names]
        charts.append(np.asarray(chart(curves, f"{task}: shares that are right, over steps", from_zero=True)))
    return Image.fromarray(np.concatenate(charts))

"""What the benchmark times, as values: the rows of the document's table for Ascend 910, and what else is waited for."""
from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Setting:
    """What is timed.

    Attributes:
        task: of TASKS.
        version: of the model: "1.5", "xl", "demo" or "xl_demo".
        batch_size: pictures made or learned from together; guidance doubles what the UNet is given.
        height: of a picture in pixels.
        width: likewise.
        steps: of a sampler, or how often a step is made.
        steps_per_second: on Ascend 910 with MindSpore 2.2, by the user's document; None where it has none.
        images_per_second: likewise.
    """

    task: str
    version: str
    batch_size: int
    height: int
    width: int
    steps: int
    steps_per_second: float | None = None
    images_per_second: float | None = None


# The rows of the user's document, then what else is waited for.
SETTINGS = (
    Setting("train", "1.5", 16, 512, 512, 1, None, 14.41),
    Setting("image_variation", "1.5", 4, 512, 512, 50, 4.97, 0.36),
    Setting("image_to_image", "1.5", 4, 512, 512, 30, 4.81, 0.52),
    Setting("inpainting", "1.5", 4, 512, 768, 35, 2.69, 0.26),
    Setting("controlnet", "1.5", 4, 512, 512, 50, 2.87, 0.22),
    Setting("train", "xl", 4, 1024, 1024, 1, None, 8.37 / 4),  # 8.37 is that of four devices
    Setting("image_variation", "xl", 4, 1024, 1024, 30, 1.24, 0.15),
    Setting("controlnet", "xl", 3, 1024, 1024, 30, 2.55, 0.25),
    *(Setting(task, version, 1, size, size, 1) for version, size in (("1.5", 512), ("xl", 1024))
      for task in ("unet_step", "train_uncached", "load", "merge")),
    Setting("command", "1.5", 1, 512, 512, 20), Setting("command", "xl", 1, 512, 512, 3),
    Setting("read", "1.5", 16, 512, 512, 4), Setting("read", "xl", 4, 1024, 1024, 4),
    *(Setting(task, version, batch, 96, 96, steps) for version in ("demo", "xl_demo") for task, batch, steps in (
        ("train", 32, 1), ("train_uncached", 32, 1), ("image_variation", 4, 20), ("image_to_image", 4, 12),
        ("inpainting", 4, 14), ("controlnet", 4, 20), ("unet_step", 4, 1), ("command", 4, 20), ("load", 1, 1),
        ("merge", 1, 1), ("read", 32, 4))),
)
TASKS = tuple(dict.fromkeys(setting.task for setting in SETTINGS))
ALONE = ("load", "merge", "read")  # what is not held against diffusers
NO_NETWORK = (*ALONE, "command")  # none runs in the process that times
SAMPLED = ("image_variation", "image_to_image", "inpainting", "controlnet", "command")  # what shortcuts shorten


def setting_of(task: str, version: str, **changes: int | None) -> Setting:
    """The setting of a task, with what is not None of `changes` in place of the document's."""
    setting = next(s for s in SETTINGS if (s.task, s.version) == (task, version))
    given = {name: value for name, value in changes.items() if value is not None}
    if any(getattr(setting, name) != value for name, value in given.items()):
        given.update(steps_per_second=None, images_per_second=None)  # figures of other work
    return replace(setting, **given)

"""What the demo model is asked for when it is judged, as values; `demo_evaluation.py` makes and judges the images."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """What a model is given.

    Attributes:
        ip_scale: weight of the picture prompt.
        text: "neutral" (the scripts' default prompt), "caption", or "other ground" (another ground colour alone).
        controlled: whether the outline is a hint.
        half: whether only the half with the shape's centre is repainted, of the scene's own picture.
    """

    ip_scale: float = 1.0
    text: str = "neutral"
    controlled: bool = False
    half: bool = False


TASKS = {"image": Task(), "text": Task(0.0, "caption"), "both": Task(0.5, "other ground"),
         "controlnet": Task(controlled=True), "inpainting": Task(controlled=True, half=True)}

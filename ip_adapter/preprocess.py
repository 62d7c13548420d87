"""Pictures in: opening whatever a user has, and CLIP's resize, crop and normalisation."""
from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ldm.errors import UserError

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
MAX_PIXELS = 200_000_000  # beyond any camera; a header can claim more than memory holds

Image.MAX_IMAGE_PIXELS = None  # MAX_PIXELS is checked below, with a message of our own


def open_image(path, flag: str = "--img") -> Image.Image:
    """Open a picture as 8-bit RGB: first frame, EXIF orientation applied, transparency over white, 16 bits scaled.

    Args:
        path: file.
        flag: the flag that named it, for messages.

    Raises:
        UserError: missing, not a picture, truncated, empty or absurdly large.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{flag} {path}: no such file; give the path of a picture")
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a folder; give the path of a picture")
    if path.stat().st_size == 0:
        raise UserError(f"{flag} {path}: the file is empty; expected a picture (PNG, JPEG, WebP, ...)")
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UserError(f"{flag} {path}: {width} x {height} pixels, at most {MAX_PIXELS:,} are taken; "
                                "resize it")
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{flag} {path}: is not a picture; expected PNG, JPEG, WebP, ...") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... on damaged files
        raise UserError(f"{flag} {path}: cannot be read ({error}); it may be truncated or damaged") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to 8-bit RGB."""
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey and its kin: Pillow would clip, not scale
        values = np.asarray(image, np.float64)
        top = 65535.0 if values.max() > 255 else 255.0
        image = Image.fromarray(np.round(np.clip(values / top, 0, 1) * 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def clip_pixels(image: Image.Image, size: int = 224) -> np.ndarray:
    """A picture as CLIP's image encoder takes it, the same in training and inference.

    Args:
        image: 8-bit RGB.
        size: side of the square.

    Returns:
        (3, size, size) float32: shortest edge to `size` (bicubic on 8-bit pixels), centre crop, OpenAI's mean and
        deviation.

    Source:
        huggingface/transformers: src/transformers/models/clip/image_processing_clip.py.
    """
    width, height = image.size
    short, long = min(width, height), max(width, height)
    other = int(size * long / short)
    image = image.resize((size, other) if width <= height else (other, size), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255.0
    return ((pixels - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1).copy()

"""Pictures in: opening whatever a user has, resizing, masks and hints, and CLIP's resize, crop and normalisation."""
from __future__ import annotations

import logging
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError

from ldm.errors import UserError

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
MAX_PIXELS = 200_000_000  # beyond any camera; a header can claim more than memory holds

log = logging.getLogger(__name__)

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


def fit(image: Image.Image, width: int, height: int, flag: str) -> Image.Image:
    """A picture at the size of the output (Lanczos); a change of size is said in one line."""
    if image.size == (width, height):
        return image
    log.info("%s: resized from %dx%d to %dx%d", flag, *image.size, width, height)
    return image.resize((width, height), Image.LANCZOS)


def latent_pixels(image: Image.Image) -> np.ndarray:
    """A picture as the autoencoder takes it: (1, 3, H, W) float32 in [-1, 1]."""
    return (np.asarray(image, np.float32) / 127.5 - 1.0).transpose(2, 0, 1)[None].copy()


def hint_pixels(image: Image.Image) -> np.ndarray:
    """A picture as a ControlNet takes it: (1, 3, H, W) float32 in [0, 1]."""
    return (np.asarray(image, np.float32) / 255.0).transpose(2, 0, 1)[None].copy()


def canny(image: Image.Image, low: int, high: int) -> Image.Image:
    """White outlines on black, as ControlNets for Canny edges were trained on.

    Args:
        image: RGB at the size of the output.
        low: gradient from which an edge goes on.
        high: gradient from which an edge starts.
    """
    edges = cv2.Canny(np.asarray(image), low, high)
    return Image.fromarray(np.repeat(edges[:, :, None], 3, 2))


def read_mask(path, width: int, height: int, invert: bool = False, flag: str = "--ref_mask") -> np.ndarray:
    """What to repaint.

    Args:
        path: picture, white where it is to be repainted.
        width: of the output; a mask of another size is resized, with a notice.
        height: of the output.
        invert: black is repainted instead.
        flag: the flag that named it, for messages.

    Returns:
        (height, width) bool.

    Raises:
        UserError: not a picture, or nothing to repaint.
    """
    grey = fit(open_image(path, flag), width, height, f"{flag} {path}").convert("L")
    mask = (np.asarray(grey) >= 128) != invert
    colour = "black" if invert else "white"
    if not mask.any():
        raise UserError(f"{flag} {path}: nothing to repaint, no pixel is {colour}; "
                        f"{'leave --invert_mask out' if invert else '--invert_mask repaints black'}")
    if not latent_mask(mask).any():
        raise UserError(f"{flag} {path}: nothing to repaint, its {colour} part is thinner than the latents' cells of "
                        "8x8 pixels; paint more of it")
    return mask


def latent_mask(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool -> (1, 1, H / 8, W / 8) float32 by nearest sampling: every eighth pixel, as diffusers does."""
    return mask[None, None, ::8, ::8].astype(np.float32)


def paste(pictures: np.ndarray, original: Image.Image, mask: np.ndarray, blur: float = 0.0) -> np.ndarray:
    """Put the kept pixels back.

    Args:
        pictures: (B, H, W, 3) uint8.
        original: RGB of the same size.
        mask: (H, W) bool, True where it was repainted.
        blur: width in pixels of the soft edge. It lies within the repainted part, so kept pixels stay identical.

    Returns:
        (B, H, W, 3) uint8.
    """
    weight = mask.astype(np.float32)
    if blur > 0:
        # The blurred mask is about one half at the edge, from where the weight rises to one.
        soft = Image.fromarray((mask * np.uint8(255))).filter(ImageFilter.GaussianBlur(blur))
        weight *= np.clip(2.0 * np.asarray(soft, np.float32) / 255.0 - 1.0, 0.0, 1.0)
    weight = weight[:, :, None]
    return np.round(weight * pictures + (1.0 - weight) * np.asarray(original, np.float32)).astype(np.uint8)

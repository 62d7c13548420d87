"""Pictures in: opening whatever a user has, resizing, masks and hints, and CLIP's resize, crop and normalisation."""
from __future__ import annotations

import contextlib
import logging
import warnings
from functools import lru_cache
from typing import Iterator

import cv2
import numpy as np
from PIL import Image, ImageFilter, UnidentifiedImageError

from ldm.errors import UserError
from ldm.files import check_readable, printable

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
MAX_PIXELS = 200_000_000  # beyond any camera; a header can claim more than memory holds
MAX_RATIO = 100  # of the sides of what is resized as a whole: a line of pixels would become gigabytes
# What is opened, by Pillow's names. Others are not tried: EPS would start Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")
EXPECTED = "an image (PNG, JPEG, WebP, ...)"
EXIF_ORIENTATION = 0x0112
IMAGE_WIDTH, IMAGE_HEIGHT, SAMPLE_FORMAT = 256, 257, 339  # TIFF's tags
TURN = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90}

log = logging.getLogger(__name__)

Image.MAX_IMAGE_PIXELS = None  # MAX_PIXELS is checked below, with a message of our own
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # on damaged metadata; they name no file


def open_image(path, flag: str = "--img", background: str | None = "white") -> Image.Image:
    """Open a picture as 8-bit RGB: first frame, EXIF orientation applied, other ranges of values scaled.

    Args:
        path: file.
        flag: the flag that named it, for messages.
        background: what shows through transparent parts; None takes colours as if nothing were transparent.

    Raises:
        UserError: missing, not a picture, truncated, empty or absurdly large.
    """
    with _opened(path, flag) as image:
        image.load()
        turn = TURN.get(orientation(image, f"{flag} {printable(path)}"))
        rgb = to_rgb(image, background)
        return rgb if turn is None else rgb.transpose(turn)


def shown_size(path, flag: str = "--img") -> tuple:
    """(width, height) of a picture as `open_image` gives it, read off its header.

    Raises:
        UserError: as `open_image`, as far as the header tells.
    """
    with _opened(path, flag) as image:
        width, height = image.size
        if image.format == "TIFF":  # some versions of Pillow have turned its size already
            width, height = image.tag_v2[IMAGE_WIDTH], image.tag_v2[IMAGE_HEIGHT]
        lying = orientation(image, f"{flag} {printable(path)}") >= 5
        return (height, width) if lying else (width, height)


@contextlib.contextmanager
def _opened(path, flag: str) -> Iterator[Image.Image]:
    """A picture whose header is read; whatever is wrong with it in the block becomes a UserError."""
    shown = f"{flag} {printable(path)}"
    try:
        if check_readable(path, flag, EXPECTED).stat().st_size == 0:
            raise UserError(f"{shown}: the file is empty; expected {EXPECTED}")
        # By its name Pillow 12 would map an uncompressed TIFF into memory, with the sides of a turned one swapped.
        with open(path, "rb") as file, Image.open(file, formats=_formats()) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UserError(f"{shown}: {width} x {height} pixels, at most {MAX_PIXELS:,} are taken; resize it")
            yield image
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{shown}: is not an image of a known format; expected {', '.join(_formats())}") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... on damaged files
        why = printable(error) or type(error).__name__
        raise UserError(f"{shown}: cannot be read ({why}); it may be truncated or damaged") from None


@lru_cache(maxsize=None)
def _formats() -> list:
    """Those of FORMATS that this Pillow can read."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def orientation(image: Image.Image, name: str) -> int:
    """The EXIF orientation of a picture, 1 (upright) to 8; 1, with a notice, if its EXIF data are damaged."""
    try:
        found = image.getexif().get(EXIF_ORIENTATION, 1)
        return found if found in TURN else 1
    except Exception as error:  # as above: the data are another file, of another format, within the file
        _notice(f"{name}: its EXIF data are damaged ({printable(error)}); taken as it is, without turning it")
        return 1


@lru_cache(maxsize=1000)  # a training opens the same picture again and again
def _notice(message: str) -> None:
    log.warning(message)


def to_rgb(image: Image.Image, background: str | None = "white") -> Image.Image:
    """Any Pillow mode to 8-bit RGB; see `open_image`.

    Raises:
        ValueError: not all of its values are finite.
    """
    if image.mode.startswith("I") or image.mode == "F":  # Pillow would clip, not scale
        values = np.asarray(image)
        if image.mode == "I" and getattr(image, "tag_v2", {}).get(SAMPLE_FORMAT, (2,)) == (1,):
            values = values.view(np.uint32)  # Pillow takes unsigned ones for signed
        image = Image.fromarray(_to_8_bits(values))
    if background and (image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Grey values of any type: floats of 0 to 1, 8 or 16 bits by their range, what goes beyond by its own."""
    low, top = min(0.0, float(values.min())), float(values.max())
    if not np.isfinite(low + top):
        raise ValueError("not all of its values are finite numbers")
    if values.dtype.kind == "f" and top <= 2:  # above 1: resampling overshoots
        low, top = 0.0, 1.0
    elif top <= 65535:
        low, top = 0.0, 65535.0 if top > 255 else 255.0
    scaled = (values.astype(np.float32) - low) / (top - low)
    return np.round(np.clip(scaled, 0, 1) * 255).astype(np.uint8)


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
    image = _middle(image)
    width, height = image.size
    short, long = min(width, height), max(width, height)
    other = int(size * long / short)
    image = image.resize((size, other) if width <= height else (other, size), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255.0
    return ((pixels - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1).copy()


def _middle(image: Image.Image) -> Image.Image:
    """What is not cropped of a picture, and as much around it as MAX_RATIO allows; most are left whole."""
    kept = [min(side, MAX_RATIO * min(image.size) + side % 2) for side in image.size]  # about the same centre
    left, top = ((side - part) // 2 for side, part in zip(image.size, kept))
    return image if tuple(kept) == image.size else image.crop((left, top, left + kept[0], top + kept[1]))


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
        path: picture, white where it is to be repainted; as in diffusers, transparency does not count.
        width: of the output; a mask of another size is resized, with a notice.
        height: of the output.
        invert: black is repainted instead.
        flag: the flag that named it, for messages.

    Returns:
        (height, width) bool.

    Raises:
        UserError: not a picture, or nothing to repaint.
    """
    name = f"{flag} {printable(path)}"
    grey = fit(open_image(path, flag, background=None), width, height, name).convert("L")
    mask = (np.asarray(grey) >= 128) != invert
    colour = "black" if invert else "white"
    if not mask.any():
        raise UserError(f"{name}: nothing to repaint, no pixel is {colour}; "
                        f"{'leave --invert_mask out' if invert else '--invert_mask repaints black'}")
    if not latent_mask(mask).any():
        raise UserError(f"{name}: nothing to repaint, its {colour} part is thinner than the latents' cells of "
                        "8x8 pixels; paint more of it")
    if mask.all():
        log.warning("%s: everything is repainted, all its pixels are %s (transparency does not count); paint what is "
                    "to be kept %s", name, colour, "white" if invert else "black")
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

"""Turn the captions of COCO into img_txt.csv, one row a caption, as the training scripts read it.

python tools/prepare_coco.py --label COCO2017/annotations/captions_train2017.json --image COCO2017/train2017
"""
from __future__ import annotations

import csv
import json
import logging
import os
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, this folder is not a package

from ip_adapter.cli.script import run_script, watch_signals  # noqa: E402

watch_signals(__name__)

from ip_adapter.cli.parser import Parser, start_logging  # noqa: E402
from ip_adapter.data.dataset import COLUMNS, CSV_NAME  # noqa: E402
from ldm.errors import UserError  # noqa: E402
from ldm.files import (  # noqa: E402
    check_folder,
    check_readable,
    check_writable,
    printable,
    reason,
    replacing,
    valid_unicode,
)

EXPECTED = "COCO's captions as JSON, such as annotations/captions_train2017.json"


def main(argv: list | None = None) -> None:
    """Parse the flags, read the captions, write those whose image is there."""
    parser = Parser(__doc__)
    parser.add_argument("--label", required=True, help="captions_train2017.json, or another year's")
    parser.add_argument("--image", required=True, help="folder with its images")
    parser.add_argument("--out", help=f".csv file to write (default: {CSV_NAME} in the folder of the images, where it "
                                      "belongs)")
    args = parser.parse_args(argv)
    start_logging()
    label, folder = check_readable(args.label, "--label", EXPECTED), check_folder(args.image, "--image")
    out = check_writable(folder / CSV_NAME if args.out is None else args.out, "--out")
    if out.suffix.lower() != ".csv":  # it might be an image, or the label file
        raise UserError(f"--out {printable(out)}: does not end in .csv; name a file that does, such as {CSV_NAME}")

    captions, odd = read_captions(label)
    names = find_images({name for name, _ in captions}, folder)
    rows = [(names[name], text) for name, text in captions if name in names]
    odd["left out, their image is not in the folder"] += len(captions) - len(rows)
    if not rows:
        raise UserError(f"--image {printable(folder)}: holds none of the images that --label {printable(label)} names, "
                        f"such as {printable(captions[0][0])}; is it the folder of another year?")
    write_csv(rows, out)
    logging.info("%d captions of %d images written into %s", len(rows), len(set(names.values())), printable(out))
    if any(odd.values()):
        missing = [name for name, _ in captions if name not in names]
        example = f"; there is no {printable(missing[0])}, for one" if missing else ""
        logging.warning("odd captions: %s%s", _counts(odd), example)


def read_captions(path: Path) -> tuple:
    """Image names and captions of a COCO file, in its order; line ends in captions become spaces.

    Returns:
        (name, caption) for each caption that can be used, and a Counter of what was found wrong with captions.

    Raises:
        UserError: it is not a file of COCO captions, or none can be used.
    """
    try:
        label = json.loads(path.read_text(encoding="utf-8-sig"))
        images, annotations = label["images"], label["annotations"]
        if not (isinstance(images, list) and isinstance(annotations, list)):
            raise TypeError("images and annotations are no lists")
    except (ValueError, TypeError, KeyError, RecursionError, OSError) as error:
        found = f"no {error}" if isinstance(error, KeyError) else f"not what was expected ({printable(error)})"
        raise UserError(f"--label {printable(path)}: {found}; expected {EXPECTED}, with images (id, file_name) and "
                        "annotations (image_id, caption)") from None
    names = {_get(image, "id"): _get(image, "file_name") for image in images}
    captions, odd = [], Counter()
    for annotation in annotations:
        number, text = _get(annotation, "image_id"), _get(annotation, "caption")
        name = names.get(number) if number is not None else None
        if not isinstance(text, str):
            odd["left out, without a text"] += 1
        elif not isinstance(name, str):
            odd["left out, of an image without a name"] += 1
        else:
            odd["mended, with half a character"] += text != valid_unicode(text)
            captions.append((valid_unicode(name), " ".join(valid_unicode(text).split())))
    if not captions:
        raise UserError(f"--label {printable(path)}: holds no captions that can be used "
                        f"({_counts(odd) or '0 in all'}); expected {EXPECTED}")
    return captions, odd


def _get(entry, key: str):
    """A number or text of an entry; None for whatever else is there."""
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if isinstance(value, (int, float, str)) else None


def _counts(odd: Counter) -> str:
    return "; ".join(f"{count} {kind}" for kind, count in odd.items() if count)


def find_images(names: set, folder: Path) -> dict:
    """Where images are, as paths within the folder.

    Some files name them with the folder they are in, such as train2017/000000000009.jpg: then the last part counts.

    Returns:
        The path of each name whose image is there.
    """
    present = {entry.name for entry in os.scandir(folder)}
    found = {}
    for name in names:
        last = re.split(r"[/\\]", name)[-1]
        if name in present or last != name and os.path.isfile(folder / name):
            found[name] = name
        elif last in present:
            found[name] = last
    return found


def write_csv(rows: list, out: Path) -> None:
    """Write names and captions, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with replacing(out, text=True) as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    except OSError as error:
        raise UserError(f"--out {printable(out)}: cannot be written ({reason(error)}); free some space or name another "
                        "file") from None


if __name__ == "__main__":
    run_script(main)

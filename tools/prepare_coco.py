"""Turn the captions of COCO into img_txt.csv, one row a caption, as the training scripts read it.

python tools/prepare_coco.py --label COCO2017/annotations/captions_train2017.json --image COCO2017/train2017
"""
from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from pathlib import Path

import pandas

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, this folder is not a package

from ip_adapter.cli import Parser, existing_file, start_logging  # noqa: E402
from ip_adapter.dataset import COLUMNS, CSV_NAME  # noqa: E402
from ip_adapter.script import run_script  # noqa: E402
from ldm.errors import UserError  # noqa: E402


def main(argv: list | None = None) -> None:
    """Parse the flags, read the captions, write those whose picture is there."""
    parser = Parser(__doc__)
    parser.add_argument("--label", type=existing_file, required=True, help="captions_train2017.json, or another year's")
    parser.add_argument("--image", type=Path, required=True, help="folder with its pictures")
    parser.add_argument("--out", type=Path, help=f"file to write (default: {CSV_NAME} in the folder of the pictures, "
                                                 "where it belongs)")
    args = parser.parse_args(argv)
    start_logging()
    if not args.image.is_dir():
        raise UserError(f"--image {args.image}: is no folder; expected the folder with the pictures, such as train2017")
    out = args.out or args.image / CSV_NAME
    captions = read_captions(args.label)
    present = captions["dir"].isin({entry.name for entry in os.scandir(args.image)})
    if not present.any():
        raise UserError(f"--image {args.image}: holds none of the {captions['dir'].nunique()} pictures that --label "
                        f"{args.label} names, such as {captions['dir'].iloc[0]}; is it the folder of another year?")
    write_csv(captions[present], out)
    logging.info("%d captions of %d pictures written into %s", present.sum(), captions["dir"][present].nunique(), out)
    if not present.all():
        missing = captions["dir"][~present]
        logging.warning("left out: %d captions of %d pictures that are not in %s, such as %s", len(missing),
                        missing.nunique(), args.image, missing.iloc[0])


def read_captions(path: Path) -> pandas.DataFrame:
    """Picture names (`dir`) and captions (`text`) of a COCO file, in its order; line ends in captions become spaces.

    Raises:
        UserError: it is not a file of COCO captions.
    """
    try:
        with open(path, encoding="utf-8") as file:
            label = json.load(file)
        names = {image["id"]: image["file_name"] for image in label["images"]}
        rows = [(names[caption["image_id"]], " ".join(caption["caption"].split())) for caption in label["annotations"]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        found = f"no {error}" if isinstance(error, KeyError) else f"not what was expected ({error})"
        raise UserError(f"--label {path}: {found}; expected COCO's captions as JSON, with images (id, file_name) and "
                        "annotations (image_id, caption), such as annotations/captions_train2017.json") from None
    if not rows:
        raise UserError(f"--label {path}: holds no captions")
    return pandas.DataFrame(rows, columns=list(COLUMNS))


def write_csv(captions: pandas.DataFrame, out: Path) -> None:
    """Write under a temporary name first, so that a full disk leaves the old file or none.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".prepare_coco.") as unfinished:
            captions.to_csv(Path(unfinished) / CSV_NAME, index=False)
            os.replace(Path(unfinished) / CSV_NAME, out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error}); free some space or name another "
                        "file") from None


if __name__ == "__main__":
    run_script(main)

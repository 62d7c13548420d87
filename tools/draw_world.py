"""Draw the pictures the demo models are trained on: coloured shapes, with captions in img_txt.csv.

python tools/draw_world.py --out datasets/drawn_world --count 5000
"""
from __future__ import annotations

import argparse
import csv
import logging
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, this folder is not a package

from ip_adapter.cli.script import run_script, watch_signals  # noqa: E402

watch_signals(__name__)

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from ip_adapter.cli.parser import Parser, in_range, start_logging  # noqa: E402
from ip_adapter.demo.scenes import (  # noqa: E402
    CAPTIONS,
    draw,
    ground_caption,
    other_ground,
    random_scene,
    training_caption,
)
from ldm.errors import UserError  # noqa: E402
from ldm.files import check_writable, printable, reason, temporary_folder  # noqa: E402


def main(argv: list | None = None) -> None:
    """Parse the flags and draw."""
    parser = Parser(__doc__)
    parser.add_argument("--out", required=True, help="folder to write, new or empty")
    parser.add_argument("--count", type=in_range(int, 1, 10_000_000), default=5000, help="how many pictures")
    parser.add_argument("--seed", type=in_range(int, 0, 2**63), default=0, help="picture n follows from seed and n")
    parser.add_argument("--size", type=in_range(int, 32, 1024), default=128, help="side of the pictures in pixels")
    parser.add_argument("--alike", type=in_range(int, 1, 10_000_000), default=1,
                        help="so many pictures in a row have the same two colours, so that shapes and places tell them "
                             "apart: what a text and image encoder otherwise need not learn")
    parser.add_argument("--captions", choices=list(CAPTIONS), default="mixed",
                        help="whole ones name everything, for the same purpose; partial ones leave most to the picture "
                             "prompt, for adapters; mixed ones are for UNets and ControlNets")
    parser.add_argument("--other_ground", type=in_range(float, 0, 1), default=0.0,
                        help="share of rows whose picture prompt (column image_prompt) has another ground, and whose "
                             "caption names the ground alone: an adapter learns to leave to the text what it says")
    args = parser.parse_args(argv)
    start_logging()
    out, name = check_writable(args.out, "--out", folder=True).resolve(), f"--out {printable(args.out)}"
    try:
        held = sorted(path.name for path in out.iterdir()) if out.exists() else []
        if held:
            shown = printable("img_txt.csv" if "img_txt.csv" in held else held[0])
            raise UserError(f"{name}: already holds {shown}, expected a new or empty folder; name another, or remove "
                            "what is there")
        with temporary_folder(out.parent, ".draw_world.") as unfinished:
            folder = unfinished / "drawn"
            folder.mkdir()
            write_pictures(folder, args)
            folder.rename(out)
    except OSError as error:
        raise UserError(f"{name}: cannot be written ({reason(error)}); free some space or choose another "
                        "folder") from None
    logging.info("%d pictures and img_txt.csv written into %s", args.count, printable(args.out))


def write_pictures(folder: Path, args: argparse.Namespace) -> None:
    """Pictures 00000.png and on, captions and picture prompts (img_txt.csv) and what was drawn (scenes.csv)."""
    digits = max(5, len(str(args.count - 1)))
    captions, scenes = [], []
    for number in tqdm(range(args.count), disable=None):
        rng = np.random.default_rng([args.seed, number])
        colours = np.random.default_rng([args.seed, number // args.alike, 1]) if args.alike > 1 else None
        scene = random_scene(rng, colours)
        name = f"{number:0{digits}d}.png"
        draw(scene, args.size).save(folder / name)
        captions.append({"dir": name, "text": training_caption(scene, rng, args.captions)})
        if args.other_ground:
            captions[-1]["image_prompt"] = ""
            if rng.random() < args.other_ground:
                captions[-1].update(text=ground_caption(scene, rng), image_prompt=f"prompt_{name}")
                draw(other_ground(scene, rng), args.size).save(folder / f"prompt_{name}")
        scenes.append({"dir": name, **asdict(scene)})
    for name, rows in (("img_txt.csv", captions), ("scenes.csv", scenes)):
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    run_script(main)

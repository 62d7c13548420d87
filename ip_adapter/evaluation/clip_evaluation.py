"""An evaluation: pictures from every picture prompt of a data set, their scores, a table; it goes on after a stop."""
from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import math
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ip_adapter.data.dataset import ImageTextDataset
from ip_adapter.evaluation.clip_score import ClipScorer
from ip_adapter.evaluation.results import save_image, writing
from ip_adapter.generation import generate
from ip_adapter.images.preprocess import open_image
from ip_adapter.images.saving import file_sha256, grid
from ip_adapter.weights.loading import ImagePromptModel
from ldm.errors import UserError
from ldm.files import check_readable, printable, replacing, write_text

COLUMNS = ("row", "dir", "clip_i", "clip_t", "check")
DIGITS = 6  # of scores, few enough for a spreadsheet to keep them
SHEET_ROWS = 8
PAPER = {"clip_i": 0.828, "clip_t": 0.588}  # arXiv 2308.06721, table 1, IP-Adapter
# Settings that decide a picture or its score; a folder holds those of one choice.
SETTINGS = ("variations", "prompt", "negative_prompt", "ip_scale", "scale", "sampling_steps", "size", "seed")

log = logging.getLogger(__name__)


class Evaluation:
    """Makes and scores pictures row by row into a folder.

    In it: `pictures/ROW-K.png`, `results.csv` with a line for each row done, `settings.json`, `table.txt`, `sheet.png`.

    Args:
        args: parsed flags of tools/evaluate.py.
        weights: the checkpoint.
        dataset: picture prompts and their captions.

    Raises:
        UserError: the folder holds an evaluation with other settings, or what it holds cannot be told.
    """

    def __init__(self, args: argparse.Namespace, weights: Path, dataset: ImageTextDataset):
        self.args, self.dataset, self.folder = args, dataset, args.out
        files = {"weights": weights, "ip_adapter": args.ip_adapter, "clip": args.clip}
        self.settings = {**{key: getattr(args, key) for key in SETTINGS},
                         **{key: file_sha256(path) if path else None for key, path in files.items()},
                         **({"clip_activation": args.clip_activation} if args.clip else {})}
        note = self.folder / "settings.json"
        if note.exists():
            found = read_settings(note)
            differing = [f"{key} {repr(found.get(key))[:80]} (now {self.settings.get(key)!r})"
                         for key in {**self.settings, **found} if found.get(key) != self.settings.get(key)]
            if differing:
                raise UserError(f"--out {printable(self.folder)}: holds an evaluation with {', '.join(differing[:5])}; "
                                "give the same, or another folder")

    def run(self, model: ImagePromptModel, scorer: ClipScorer) -> str:
        """Make and score what is missing; returns the table.

        Raises:
            UserError: something cannot be written; what was finished before is kept.
        """
        args, results = self.args, self.folder / "results.csv"
        done = [row for row in read_results(results) if all(path.is_file() for path in self._paths(row["row"]))]
        known = {row["row"] for row in done}
        model.set_ip_scale(args.ip_scale)
        model.diffusion.set_size(args.size, args.size)
        texts = [model.diffusion.condition([text]) for text in (args.prompt, args.negative_prompt)]
        for n in tqdm(range(min(args.count, len(self.dataset))), desc="evaluating", unit="row", disable=None):
            if n in known:
                continue
            row = self.dataset.sample(n, None).index  # another one if n cannot be read
            picture = self.dataset.picture(row)
            made = self._make(model, picture, texts, n)
            clip_t = scorer.clip_t(made, self.dataset.text(row))
            done.append({"row": n, "dir": printable(self.dataset.path(row).name),
                         "clip_i": round(scorer.clip_i(made, picture), DIGITS),
                         "clip_t": None if clip_t is None else round(clip_t, DIGITS)})
            with writing(self.folder, "--out"):
                self._keep(made, done)
        with writing(self.folder, "--out"):
            return self._table(done)

    def _paths(self, n: int) -> list:
        return [self.folder / "pictures" / f"{n:06d}-{k}.png" for k in range(self.args.variations)]

    def _keep(self, made: np.ndarray, done: list) -> None:
        """Write the pictures of the last row, then that it is done: a stop in between costs this row only."""
        for path, pixels in zip(self._paths(done[-1]["row"]), made):
            save_image(path, Image.fromarray(pixels))
        if not (self.folder / "settings.json").exists():
            write_text(self.folder / "settings.json", json.dumps(self.settings, indent=1) + "\n")
        with replacing(self.folder / "results.csv", text=True) as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, "check": _check(row)} for row in done)

    def _make(self, model: ImagePromptModel, picture: Image.Image, texts: list, n: int) -> np.ndarray:
        args, sides = self.args, model.with_image(texts, model.embed(picture))
        seeds = [args.seed + n * args.variations + k for k in range(args.variations)]
        return generate(model, sides, seeds, args.size, args.sampling_steps, args.scale)

    def _table(self, done: list) -> str:
        """Write table and sheet; returns the table."""
        lines = [f"{len(done)} picture prompts x {self.args.variations}, {self.args.sampling_steps} steps, guidance "
                 f"{self.args.scale}, image scale {self.args.ip_scale}", "          here    paper (COCO val 2017)"]
        for name, title in (("clip_i", "CLIP-I"), ("clip_t", "CLIP-T")):
            scores = [row[name] for row in done if row[name] is not None]
            shown = f"{np.mean(scores):.3f}" if scores else "  -  (needs --clip)"
            lines.append(f"{title:8}  {shown}   {PAPER[name]:.3f}")
        table = "\n".join(lines)
        write_text(self.folder / "table.txt", table + "\n")
        rows = []
        for row in done[:SHEET_ROWS]:
            made = np.stack([np.asarray(open_image(path, "--out")) for path in self._paths(row["row"])])
            prompt = self.dataset.picture(self.dataset.sample(row["row"] % len(self.dataset), None).index)
            rows.append(np.asarray(grid([prompt], made)))
        save_image(self.folder / "sheet.png", Image.fromarray(np.concatenate(rows)))
        return table


def read_settings(note: Path) -> dict:
    """What the pictures of a folder were made with.

    Raises:
        UserError: it cannot be read; then nobody knows whether new pictures belong to the old ones.
    """
    check_readable(note, "--out", "the settings of an evaluation")
    try:
        found = json.loads(note.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        found = error
    if not isinstance(found, dict):
        raise UserError(f"--out {printable(note)}: is damaged, expected the settings that an evaluation has left; name "
                        "another folder, or remove this file if the flags are the same as before")
    return found


def read_results(results: Path) -> list:
    """The rows done so far, with numbers as such; what is cut off, or no row, is left out with a notice.

    A spreadsheet may have saved the file: UTF-16, a mark at the beginning, semicolons, tabs and decimal commas are
    read. Rows have a checksum, so that a digit that has changed is no score; files of before there was one are taken
    as they are.

    Raises:
        UserError: the file cannot be opened, or not one of its rows can be read: it would be written anew without.
    """
    if not results.exists():
        return []
    data = check_readable(results, "--out", "the results of an evaluation").read_bytes()
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    text = data.decode("utf-16" if wide else "utf-8-sig", "replace").replace("\r\n", "\n").replace("\r", "\n")
    *lines, cut = text.split("\n")  # a row without its line end may end within a number
    delimiter = next((mark for mark in ";\t" if mark in text.split("\n")[0]), ",")
    header = [name.strip(' "') for name in text.split("\n")[0].split(delimiter)]
    summed = header != list(COLUMNS[:-1])
    filled = [line for line in lines if line.strip("\0 ,;\t")]
    rows = [_result(line, delimiter, summed) for line in filled[header[:1] == ["row"]:]]
    whole = {row["row"]: row for row in rows if row is not None}
    left_out = len(rows) - len(whole) + bool(cut.strip("\0"))
    if rows and not whole:
        raise UserError(f"--out {printable(results)}: none of its rows can be read, expected lines of "
                        f"{','.join(COLUMNS)} as an evaluation writes them; mend it, remove it to make all images "
                        "again, or name another folder")
    if left_out:
        log.warning("--out %s: %d rows are cut, damaged or doubled; they are made again", printable(results), left_out)
    return list(whole.values())


def _result(line: str, delimiter: str, summed: bool) -> dict | None:
    """One line of results.csv, None if it is no whole row or, with a checksum, not as it was written."""
    try:
        fields = next(csv.reader(io.StringIO(line), strict=True, delimiter=delimiter))
        number, name, clip_i, clip_t, *check = fields
        clip_i, clip_t = (score.replace(",", ".") for score in (clip_i, clip_t))
        row = {"row": int(number), "dir": name, "clip_i": float(clip_i), "clip_t": float(clip_t) if clip_t else None}
    except (ValueError, csv.Error, StopIteration):
        return None
    scores = [score for score in (row["clip_i"], row["clip_t"]) if score is not None]
    sound = 0 <= row["row"] <= 10**9 and all(math.isfinite(score) and -2 < score < 3 for score in scores)
    return row if sound and check == ([_check(row)] if summed else []) else None


def _check(row: dict) -> str:
    """A checksum of a row of results, which no spreadsheet takes for a number."""
    content = "|".join(str(row[name]) for name in COLUMNS[:-1])
    return f"x{zlib.crc32(content.encode()):08x}"

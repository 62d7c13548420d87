"""An evaluation: pictures from every picture prompt of a data set, their scores, a table; it goes on after a stop."""
from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np
import pandas
from PIL import Image
from tqdm import tqdm

from ip_adapter.build import ImagePromptModel
from ip_adapter.clip_score import ClipScorer
from ip_adapter.dataset import ImageTextDataset
from ip_adapter.generation import generate
from ip_adapter.pictures import file_sha256, grid
from ldm.errors import UserError

COLUMNS = ("row", "dir", "clip_i", "clip_t")
SHEET_ROWS = 8
PAPER = {"clip_i": 0.828, "clip_t": 0.588}  # arXiv 2308.06721, table 1, IP-Adapter
# Settings that decide a picture or its score; a folder holds those of one choice.
SETTINGS = ("variations", "prompt", "negative_prompt", "ip_scale", "scale", "sampling_steps", "size", "seed")


class Evaluation:
    """Makes and scores pictures row by row into a folder.

    In it: `pictures/ROW-K.png`, `results.csv` with a line for each row done, `settings.json`, `table.txt`, `sheet.png`.

    Args:
        args: parsed flags of tools/evaluate.py.
        weights: the checkpoint.
        dataset: picture prompts and their captions.

    Raises:
        UserError: the folder holds an evaluation with other settings.
    """

    def __init__(self, args: argparse.Namespace, weights: Path, dataset: ImageTextDataset):
        self.args, self.dataset, self.folder = args, dataset, args.out
        files = {"weights": weights, "ip_adapter": args.ip_adapter, "clip": args.clip}
        self.settings = {**{key: getattr(args, key) for key in SETTINGS},
                         **{key: file_sha256(path) if path else None for key, path in files.items()}}
        note = self.folder / "settings.json"
        if note.exists():
            found = json.loads(note.read_text())
            differing = [f"{key} {value!r} (now {self.settings.get(key)!r})" for key, value in found.items()
                         if self.settings.get(key) != value]
            if differing:
                raise UserError(f"--out {self.folder}: holds an evaluation with {', '.join(differing)}; give the same, "
                                "or another folder")

    def run(self, model: ImagePromptModel, scorer: ClipScorer) -> str:
        """Make and score what is missing; returns the table."""
        args, results = self.args, self.folder / "results.csv"
        (self.folder / "pictures").mkdir(parents=True, exist_ok=True)
        (self.folder / "settings.json").write_text(json.dumps(self.settings, indent=1) + "\n")
        done = _rows(results)
        model.set_ip_scale(args.ip_scale)
        model.diffusion.set_size(args.size, args.size)
        texts = [model.diffusion.condition([text]) for text in (args.prompt, args.negative_prompt)]
        with open(results, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(done)
            known = {int(row["row"]) for row in done}
            for n in tqdm(range(min(args.count, len(self.dataset))), desc="evaluating", unit="row", disable=None):
                if n in known:
                    continue
                row = self.dataset.sample(n, None).index  # another one if n cannot be read
                picture = self.dataset.picture(row)
                made = self._make(model, picture, texts, n)
                for k, pixels in enumerate(made):
                    Image.fromarray(pixels).save(self.folder / "pictures" / f"{n:06d}-{k}.png")
                writer.writerow({"row": n, "dir": self.dataset.path(row).name, "clip_i": scorer.clip_i(made, picture),
                                 "clip_t": scorer.clip_t(made, self.dataset.text(row))})
                file.flush()
        return self._table(results)

    def _make(self, model: ImagePromptModel, picture: Image.Image, texts: list, n: int) -> np.ndarray:
        args, sides = self.args, model.with_image(texts, model.embed(picture))
        seeds = [args.seed + n * args.variations + k for k in range(args.variations)]
        return generate(model, sides, seeds, args.size, args.sampling_steps, args.scale)

    def _table(self, results: Path) -> str:
        """Write table and sheet; returns the table."""
        scores = pandas.read_csv(results)
        lines = [f"{len(scores)} picture prompts x {self.args.variations}, {self.args.sampling_steps} steps, guidance "
                 f"{self.args.scale}, image scale {self.args.ip_scale}", "          here    paper (COCO val 2017)"]
        for name, title in (("clip_i", "CLIP-I"), ("clip_t", "CLIP-T")):
            mean = scores[name].mean()
            shown = "  -  (needs --clip)" if np.isnan(mean) else f"{mean:.3f}"
            lines.append(f"{title:8}  {shown}   {PAPER[name]:.3f}")
        table = "\n".join(lines)
        (self.folder / "table.txt").write_text(table + "\n")
        rows = []
        for n in scores["row"][:SHEET_ROWS]:
            made = np.stack([np.asarray(Image.open(self.folder / "pictures" / f"{n:06d}-{k}.png"))
                             for k in range(self.args.variations)])
            rows.append(np.asarray(grid([self.dataset.picture(self.dataset.sample(n, None).index)], made)))
        Image.fromarray(np.concatenate(rows)).save(self.folder / "sheet.png")
        return table


def _rows(results: Path) -> list:
    """The rows done so far; the last may have been cut off by a kill."""
    if not results.exists():
        return []
    with open(results, newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values() and row["row"].isdigit()]

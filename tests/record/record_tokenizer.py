"""Record CLIP token ids from Hugging Face transformers into tests/data/tokenizer_expected.json.

Run, in an environment of its own (pip install torch transformers ftfy), from the root of the repository:

    python tests/record/record_tokenizer.py

Nothing is downloaded: vocab.json and merges.txt are made in a temporary folder from the merge table in ldm/modules.
The fast tokenizer of transformers does no repairs, so prompts go through ftfy and HTML unescaping here first. The
versions that recorded the file are written into it. Prompts on which transformers and openai/CLIP disagree are left
out; tests/ldm/test_tokenizer.py lists them.
"""

from __future__ import annotations

import gzip
import html
import json
import platform
import tempfile
from pathlib import Path

import ftfy
import tokenizers
import transformers

ROOT = Path(__file__).resolve().parents[2]
MERGES = ROOT / "ldm" / "modules" / "clip_bpe_merges.txt.gz"
OUTPUT = ROOT / "tests" / "data" / "tokenizer_expected.json"

PROMPTS = [
    # plain prompts
    "a photo of a cat",
    "best quality, high quality",
    "monochrome, lowres, bad anatomy, worst quality, low quality",
    "A Polar Bear wearing SUNGLASSES on the beach, 4K, f/1.8, ISO 100",
    "masterpiece, (best quality:1.2), [ultra-detailed], {8k}, 1girl, solo, artstation",
    "portrait of a woman by Greg Rutkowski & Alphonse Mucha -- octane render | 50mm",
    # nothing, white space
    "",
    " ",
    " \t\n\r\n ",
    "a\tphoto\nof \r\n a   cat",
    "a\u00a0non-breaking\u3000ideographic\u2003space",
    # punctuation, digits, contractions
    "!!! wow?! (really)... #1 @home $5.00 50% a_b ~x~ `y` ^z^ \\ /",
    "In 2023, 1234567890 people; 3.14159 1e-5 0x1F",
    "it's we're I'm you'll they've he'd don't rock'n'roll 'tis o'clock dogs'",
    "DON'T STOP, IT'S 'S'T'RE",
    "\u201ccurly\u201d \u2018quotes\u2019 it\u2019s \u2013 dashes \u2014 and \u2026",
    "the </w> mark and <b>bold</b>",
    "https://example.com/a?b=c&d=e",
    # HTML entities, escaped once, twice, three times
    "salt &amp; pepper",
    "salt &amp;amp; pepper &lt;3",
    "salt &amp;amp;amp; pepper",
    "&#39;quoted&#39; &quot;text&quot; &eacute;t&eacute; <i>",
    # accents, composed and decomposed; text decoded wrongly
    "caf\u00e9 na\u00efve \u00dcBER stra\u00dfe \u00d1and\u00fa \u0130stanbul",
    "cafe\u0301 with a combining accent",
    "caf\u00c3\u00a9 l\u00e2\u20ac\u2122amour",
    "\ufb01re \uff26\uff35\uff2c\uff2c\uff37\uff29\uff24\uff34\uff28",
    # other scripts and symbols
    "\u4e00\u53ea\u53ef\u7231\u7684\u732b",
    "a\u732bb cat \u732b dog\u72d7",
    "\u65e5\u672c\u306e\u98a8\u666f\u3001\u30a2\u30cb\u30e1",
    "\ud55c\uad6d\uc5b4 \u043a\u043e\u0448\u043a\u0430",
    "\u05d7\u05ea\u05d5\u05dc \u0642\u0637\u0629 \u0939\u093f\u0928\u094d\u0926\u0940",
    "\u00b2\u00bd\u2163 \u0663\u0664 \u2460",
    "cat \U0001f431 dog\U0001f436\U0001f436",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd \u2764\ufe0f \U0001f1eb\U0001f1f7",
    "\u20ac100 \u00a35 \u00b0C \u2122 \u00a9 \u221e \u2192",
    # control characters, byte order mark, zero width
    "a\x00b\x07c\x1bd \x7fe",
    "\ufeffstart of file",
    "zero\u200bwidth soft\u00adhyphen",
    # special tokens written out
    "<|startoftext|>",
    "a <|startoftext|> b <|endoftext|> c",
    "<|startoftext|>cat<|endoftext|><|endoftext|>dog",
    # long
    "pneumonoultramicroscopicsilicovolcanoconiosis",
    "a" * 300,
    "xqzjkv" * 40,
    "!" * 200,
    ", ".join(f"thing number {i}" for i in range(40)),
    "word " * 75,
    "word " * 76,
]


def build_tokenizer(folder: Path) -> transformers.CLIPTokenizer:
    """Write vocab.json and merges.txt in the layout of openai/clip-vit-large-patch14 and load them."""
    merges = gzip.decompress(MERGES.read_bytes()).decode("utf-8").splitlines()
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = [chr(c) for c in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    entries = symbols + [s + "</w>" for s in symbols] + [m.replace(" ", "") for m in merges]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {entry: i for i, entry in enumerate(entries)}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return transformers.CLIPTokenizer.from_pretrained(folder)


def main() -> None:
    """Encode every prompt and write the file."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = build_tokenizer(Path(folder))
    cases = []
    for text in PROMPTS:
        cleaned = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        ids = tokenizer(cleaned, truncation=True, max_length=77)["input_ids"]
        cases.append({"text": text, "ids": ids})
    versions = {module.__name__: module.__version__ for module in (transformers, tokenizers, ftfy)}
    versions["python"] = platform.python_version()
    lines = ",\n".join("  " + json.dumps(case) for case in cases)
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(f'{{"versions": {json.dumps(versions)},\n "cases": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"{len(cases)} prompts written to {OUTPUT}")


if __name__ == "__main__":
    main()

"""CLIP byte-pair tokenizer: prompts to the token ids that all SD-1.5 and SDXL text encoders expect.

The merge table lies next to this file (MIT, see clip_bpe_merges.LICENSE). Prompt weighting such as "(word:1.2)" is
left out: brackets and digits are ordinary text.
"""

from __future__ import annotations

import functools
import gzip
import html
import logging
from pathlib import Path

import ftfy
import numpy as np
from tokenizers import Regex, decoders, models, pre_tokenizers

START = 49406
END = 49407
VOCAB_SIZE = 49408

_MERGES_FILE = Path(__file__).with_name("clip_bpe_merges.txt.gz")
_SPECIAL = {"<|startoftext|>": START, "<|endoftext|>": END}
_WORD_END = "</w>"
# (?i) on lower-cased text is not idle: it lets the long s of "it\u017f" match 's.
_PATTERN = r"(?i)<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"

# So much of a text is read. It has 77 tokens many times over, and cleaning ten million takes two minutes.
_MAX_CHARACTERS = 20_000
_MAX_SHOWN = 200  # characters of what a warning says is cut off

_log = logging.getLogger(__name__)


@functools.lru_cache(maxsize=1)
def _load() -> tuple[models.BPE, pre_tokenizers.PreTokenizer]:
    """Build the byte-pair model and the word splitter, once per process."""
    with gzip.open(_MERGES_FILE, "rt", encoding="utf-8") as file:
        merges = [tuple(line.rstrip("\n").split(" ")) for line in file]
    # By code point, the stand-in characters are in the order the published ids need: printable bytes, then the rest.
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = symbols + [s + _WORD_END for s in symbols] + ["".join(pair) for pair in merges] + list(_SPECIAL)
    vocab = {entry: i for i, entry in enumerate(entries)}
    assert len(vocab) == VOCAB_SIZE, f"{len(vocab)} distinct entries from {_MERGES_FILE}, expected {VOCAB_SIZE}"
    split = pre_tokenizers.Split(Regex(_PATTERN), behavior="removed", invert=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return models.BPE(vocab, merges, end_of_word_suffix=_WORD_END), pre_tokenizers.Sequence([split, to_bytes])


def _clean(text: str) -> str:
    """Repair the encoding, resolve HTML entities, collapse white space, lower the case."""
    # Twice, because captions scraped from the web are often escaped twice ("&amp;amp;").
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def _encode(text: str) -> list[int]:
    """Token ids of one text, any number of them, without start and end."""
    bpe, splitter = _load()
    ids = []
    for word, _ in splitter.pre_tokenize_str(_clean(text)):
        # Not registered as special tokens of the library: those would also be cut out of a run of punctuation.
        if word in _SPECIAL:
            ids.append(_SPECIAL[word])
        else:
            ids.extend(token.id for token in bpe.tokenize(word))
    return ids


class CLIPTokenizer:
    """Turns prompts into fixed-length rows of CLIP token ids.

    Args:
        pad_token: id that fills a row after the end token: 49407 for CLIP-L (SD-1.5 and SDXL), 0 for SDXL's bigG.
        context_length: length T of a row, start and end token included.

    Source: openai/CLIP: clip/simple_tokenizer.py and clip/clip.py. The ids are the same; padding is chosen here, and a
        text that is too long is cut with a warning instead of refused.
    """

    def __init__(self, pad_token: int = END, context_length: int = 77):
        self.pad_token = pad_token
        self.context_length = context_length

    def __call__(self, texts: str | list[str]) -> np.ndarray:
        """Encode one prompt or several; what does not fit is cut and named in a warning.

        Args:
            texts: one prompt or n prompts, raw; an empty string is a valid prompt.

        Returns:
            (n, T) int32: start, at most T - 2 tokens, end, padding. n is 1 for a single string.
        """
        texts = [texts] if isinstance(texts, str) else texts
        room = self.context_length - 2
        rows = np.full((len(texts), self.context_length), self.pad_token, np.int32)
        for row, text in zip(rows, texts):
            ids = _encode(text[:_MAX_CHARACTERS])
            if len(ids) > room or len(text) > _MAX_CHARACTERS:
                self._warn(ids, room, len(text))
            ids = [START, *ids[:room], END]
            row[: len(ids)] = ids
        return rows

    def _warn(self, ids: list[int], room: int, length: int) -> None:
        """Say how much of a text is not used."""
        cut = self.decode(ids[room : room + _MAX_SHOWN])  # no token is empty
        shown = repr(cut[:_MAX_SHOWN]) + "..." * (len(cut) > _MAX_SHOWN or len(ids) > room + _MAX_SHOWN)
        size = f"{len(ids)} tokens" if length <= _MAX_CHARACTERS else f"{length} characters"
        _log.warning("The prompt has %s, only %d tokens are used. Cut off: %s", size, min(room, len(ids)), shown)

    def decode(self, ids: list[int] | np.ndarray) -> str:
        """Text of some token ids, for messages.

        Args:
            ids: (n,) token ids; start, end and padding are written out too.

        Returns:
            Lower-case text with a space after every word or punctuation run; bytes that are not UTF-8 become U+FFFD.
        """
        bpe, _ = _load()
        tokens = [bpe.id_to_token(int(i)) for i in ids]
        # "\u0120" is the byte alphabet's stand-in for a space.
        tokens = [t[: -len(_WORD_END)] + "\u0120" if t.endswith(_WORD_END) else t for t in tokens]
        return decoders.ByteLevel().decode(tokens).strip()

"""CLIPTokenizer against ids recorded with transformers, and the rules in which openai/CLIP differs from it."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import numpy as np
import pytest

from ldm.modules.tokenizer import END, START, VOCAB_SIZE, CLIPTokenizer

# Recorded by tests/record/record_tokenizer.py; the versions used are in the file.
DATA = Path(__file__).parents[1] / "data" / "tokenizer_expected.json"
CASES = json.loads(DATA.read_text(encoding="utf-8"))["cases"]


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer()


def words(tokenizer, text):
    """Token ids of a short text without start, end and padding."""
    row = tokenizer(text)[0].tolist()
    length = len(row)
    while length > 2 and row[length - 2] == END:
        length -= 1
    return row[1 : length - 1]


@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{c['text'][:20]!a}" for i, c in enumerate(CASES)])
@pytest.mark.parametrize("pad_token", [END, 0])
def test_equals_transformers(case, pad_token):
    ids = case["ids"]
    expected = ids + [pad_token] * (77 - len(ids))
    assert CLIPTokenizer(pad_token)(case["text"]).tolist() == [expected]


def test_documented_example(tokenizer):
    row = tokenizer("a photo of a cat")[0]
    assert row.tolist() == [49406, 320, 1125, 539, 320, 2368, 49407] + [49407] * 70
    assert (START, END, VOCAB_SIZE) == (49406, 49407, 49408)


def test_shape_dtype_and_batch(tokenizer):
    texts = ["a cat", "", "two dogs & a bird"]
    batch = tokenizer(texts)
    assert batch.shape == (3, 77) and batch.dtype == np.int32
    for row, text in zip(batch, texts):
        assert np.array_equal(row, tokenizer(text)[0])
    assert tokenizer([]).shape == (0, 77)


@pytest.mark.parametrize("pad_token", [END, 0])
def test_empty_prompt_is_start_end_padding(pad_token):
    for text in ("", " \t\n", "\x00\x1f"):
        assert CLIPTokenizer(pad_token)(text).tolist() == [[START, END] + [pad_token] * 75]


def test_prompt_that_just_fits_gives_no_warning(tokenizer, caplog):
    row = tokenizer("cat " * 75)[0]
    assert row.tolist() == [START] + [2368] * 75 + [END]
    assert not caplog.records


def test_cut_text_is_named_in_a_warning(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        rows = tokenizer(["short", "cat " * 75 + "Sunset over caf\u00e9 \u732b, 4K"])
    assert rows[1].tolist() == [START] + [2368] * 75 + [END]
    (record,) = caplog.records
    assert record.name == "ldm.modules.tokenizer" and record.levelno == logging.WARNING
    assert "sunset over caf\u00e9 \u732b , 4 k" in record.getMessage()
    assert "84 tokens" in record.getMessage() and "75" in record.getMessage()


def test_cut_inside_a_character_still_warns(tokenizer, caplog):
    text = "cat " * 74 + "\U00013000"  # a rare character: four tokens, one a byte
    row = tokenizer(text)[0]
    assert row[-1] == END and row[75] != 2368
    assert "Cut off" in caplog.text and "\ufffd" in caplog.text


@pytest.mark.parametrize("text", ["cat " * 2_500_000, "c" * 10_000_000, "&amp;!" * 1_700_000,
                                  "\U0001f600\n" * 5_000_000, "\ud83d" * 10_000_000])
def test_ten_megabytes_are_cut_before_they_are_cleaned(tokenizer, caplog, text):
    begun = time.perf_counter()
    row = tokenizer(text)[0]
    assert time.perf_counter() - begun < 2
    assert row.tolist() == tokenizer(text[:10_000])[0].tolist() and row[-1] == END
    message = caplog.records[0].getMessage()
    assert f"{len(text)} characters, only 75 tokens are used" in message and len(message) < 700


def test_a_warning_shows_the_beginning_of_what_is_cut(tokenizer, caplog):
    tokenizer("cat " * 1075)
    assert caplog.records[0].getMessage() == (
        f"The prompt has 1075 tokens, only 75 tokens are used. Cut off: '{('cat ' * 1000)[:200]}'...")


def test_white_space_of_any_length_is_no_error(tokenizer, caplog):
    assert words(tokenizer, "a cat" + " " * 1_000_000) == [320, 2368]
    assert "1000005 characters, only 2 tokens are used. Cut off: ''" in caplog.text


def test_half_an_emoji_is_one_unknown_character(tokenizer):
    assert words(tokenizer, "a \ud83d cat") == words(tokenizer, "a \ufffd cat")
    assert words(tokenizer, "\ud83d\ude00") == words(tokenizer, "\U0001f600")


def test_decode_is_the_inverse_on_clean_text(tokenizer):
    for text in ("a photo of a cat", "caf\u00e9 \u732b \U0001f431 !", "it 's 2 0 2 4"):
        assert tokenizer.decode(words(tokenizer, text)) == text
    assert tokenizer.decode(tokenizer("a cat")[0, :4]) == "<|startoftext|>a cat <|endoftext|>"


# From here on transformers (5.x, fast) gives other ids; the rule of openai/CLIP is: ftfy, HTML unescape, white space,
# lower case by Python, then the regular expression, ignoring case, with nothing cut out of the text beforehand.


def test_special_token_inside_punctuation_is_punctuation(tokenizer):
    # transformers cuts special tokens out of the text first; the regular expression has already begun the run "!!<|".
    assert words(tokenizer, "!!<|endoftext|>") == words(tokenizer, "!!<| endoftext |>")
    assert words(tokenizer, "cat<|startoftext|>") == [2368, START]


def test_special_token_in_capitals_is_special(tokenizer):
    # transformers looks for special tokens before the text is in lower case.
    assert words(tokenizer, "<|StartOfText|>Cat") == [START, 2368]


def test_final_sigma_is_lowered_by_context(tokenizer):
    # Python lowers a sigma at the end of a word to the final form, the Rust code in transformers does not.
    assert words(tokenizer, "\u039f\u0394\u039f\u03a3") == words(tokenizer, "\u03bf\u03b4\u03bf\u03c2")


def test_no_composition_after_unescaping(tokenizer):
    # ftfy composes, but leaves entities alone next to "<"; transformers composes (NFC) at the end, openai does not.
    assert words(tokenizer, "< e&#769;") == words(tokenizer, "< e") + words(tokenizer, "< &#769;")[1:]


def test_contractions_ignore_case_after_lowering(tokenizer):
    # The long s is lower case already, and equals "s" when case is ignored.
    assert len(words(tokenizer, "it'\u017f")) == 1 + 3  # "it", then one run of three bytes: ' and the long s
    assert words(tokenizer, "it'\u017f")[1:] != words(tokenizer, "it' \u017f")[1:]


def test_no_spaces_around_chinese(tokenizer):
    # The variant of transformers 4 without ftfy put spaces around every Chinese character, which changes the ids.
    assert words(tokenizer, "\u732b\u72d7") != words(tokenizer, "\u732b \u72d7")

"""The merging and converting tools from the command line: mistakes are one line, status 2, nothing left behind."""
from __future__ import annotations

import os
import pickle
import re
import runpy

import pytest

from ip_adapter.weights.parts import MergedKind, kind_of_file
from tests.support.scripts import ROOT

MERGE = runpy.run_path(str(ROOT / "tools" / "merge_ckpts_sd.py"))["main"]
CONVERT = runpy.run_path(str(ROOT / "tools" / "convert_checkpoint.py"))["main"]


class _Carrier:
    """A pickle that would run code when loaded."""

    def __reduce__(self):
        return (print, ("the code in the pickle ran",))


@pytest.fixture
def flags(standins, tmp_path) -> dict:
    files = {f"--{'sd' if name == 'base' else name}": path for name, path in standins.items()}
    return {**files, "--out": tmp_path / "out" / "merged.ckpt"}


def words(flags: dict) -> list:
    return [word for pair in flags.items() for word in pair]


def test_mistakes(flags, tmp_path, outcome):
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "taken").write_bytes(b"")
    (tmp_path / "link.safetensors").symlink_to(flags["--sd"])
    (tmp_path / "cut.safetensors").write_bytes(flags["--sd"].read_bytes()[:5000])
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(_Carrier()))
    cases = [
        ({"--sd": tmp_path / "absent.ckpt"}, "--sd: .*absent.ckpt: no such file"),
        ({"--vae": tmp_path / "absent.safetensors"}, "absent.safetensors"),
        ({"--ip_adapter": tmp_path / "empty.safetensors"}, "empty.safetensors.*empty"),
        ({"--ip_adapter": tmp_path / "evil.bin"}, "evil.bin"),
        ({"--sd": tmp_path / "cut.safetensors"}, "cut.safetensors"),
        ({"--sd": flags["--ip_adapter"]}, "not a whole model"),
        ({"--out": tmp_path / "merged.bin"}, "merged.bin"),
        ({"--out": tmp_path / "taken" / "merged.ckpt"}, "taken"),
        ({"--out": flags["--vae"]}, "--out .*: is the file of --vae, which is read"),
        ({"--out": tmp_path / "link.safetensors"}, "--out .*: is the file of --sd, which is read"),
        ({"--skip_ip": ""}, "--skip_ip leaves the adapter out, so --ip_adapter .* would not be read"),
        ({"--dtype": "int8"}, "--dtype"),
        ({"--open_clip": "x"}, "unknown flag --open_clip; did you mean --open_clip_vit"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for change, expected in cases:
        status, said = outcome(MERGE, *[word for word in words({**flags, **change}) if word != ""])
        line = said.strip().splitlines()[-1]
        assert status == 2 and re.search(expected, line) and "Traceback" not in said, (change, said)
        assert "the code in the pickle ran" not in said
        out = tmp_path / "out"
        assert not out.exists() or not list(out.iterdir())
    assert [path for path in sorted(tmp_path.rglob("*")) if path != tmp_path / "out"] == before


def test_the_misspelt_flag_of_the_document_works(flags, outcome):
    adapter = flags.pop("--ip_adapter")
    status, said = outcome(MERGE, *words(flags), "--ip_adpater", adapter)
    assert status == 0 and "tensors merged into" in said and flags["--out"].exists()


def test_converting(standins, tmp_path, outcome):
    out = tmp_path / "sd_v1.5-d0ab7146.ckpt"
    status, said = outcome(CONVERT, "--source", standins["base"], "--out", out)
    assert status == 0 and out.exists() and f"tensors converted into {out}" in said
    status, said = outcome(CONVERT, "--source", standins["vae"], "--out", tmp_path / "other.ckpt")
    assert status == 2 and "not a whole model" in said and not (tmp_path / "other.ckpt").exists()
    status, said = outcome(CONVERT, "--source", out, "--out", out)
    assert status == 2 and f"--out {out}: is the file of --source, which is read" in said


def test_what_is_replaced_is_said_and_nothing_else_is_written(flags, standins, tmp_path, outcome):
    """With --out a file of any kind; what users keep in the same folder is left alone, links too."""
    out, mine = flags["--out"], tmp_path / "mine.txt"
    out.parent.mkdir()
    out.write_bytes(b"an old file")
    os.utime(out, (0, 0))
    mine.write_text("mine")
    (out.parent / "merged.ckpt.sha256").symlink_to(mine)
    status, said = outcome(MERGE, *words(flags))
    assert status == 0 and re.search(
        rf"replacing {out} \(no checkpoint that can be read; 0.0 MB, of 19(69|70)-\d\d-\d\d \d\d:\d\d\)", said), said
    status, said = outcome(MERGE, *words({name: path for name, path in flags.items() if name != "--controlnet"}))
    assert status == 0 and re.search(
        rf"replacing {out} \(SD-1.5, an image encoder of width 32, an adapter of 4 tokens, a ControlNet; \d+.\d MB, of "
        r"20\d\d-", said), said
    assert kind_of_file(out) == MergedKind("SD-1.5", 32, 4, False)
    assert sorted(path.name for path in out.parent.iterdir()) == ["merged.ckpt", "merged.ckpt.sha256"]
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("kind, suffix", [
    (MergedKind("SD-1.5", 1024, 4, False), "plain"), (MergedKind("SDXL", 1280, 4, False), "plain"),
    (MergedKind("SDXL", 1024, 4, False), "vit-h"), (MergedKind("SD-1.5", 1024, 4, True), "controlnet"),
    (MergedKind("SDXL", 1024, 4, True), "vit-h.controlnet"),
    (MergedKind("SD-1.5", 1280, 16, False), "vit-bigg.16-tokens"),
    (MergedKind("SD-1.5", 768, 0, True), "encoder-768.no-adapter.controlnet")])
def test_names_of_kinds(kind, suffix):
    assert kind.suffix() == suffix

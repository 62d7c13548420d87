"""The merging and converting tools from the command line: mistakes are one line, status 2, nothing left behind."""
from __future__ import annotations

import pickle
import re
import runpy

import pytest

from tests.conftest import ROOT

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
    (tmp_path / "cut.safetensors").write_bytes(flags["--sd"].read_bytes()[:5000])
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(_Carrier()))
    cases = [
        ({"--sd": tmp_path / "absent.ckpt"}, "--sd: no file .*absent.ckpt"),
        ({"--vae": tmp_path / "absent.safetensors"}, "absent.safetensors"),
        ({"--ip_adapter": tmp_path / "empty.safetensors"}, "empty.safetensors.*empty"),
        ({"--ip_adapter": tmp_path / "evil.bin"}, "evil.bin"),
        ({"--sd": tmp_path / "cut.safetensors"}, "cut.safetensors"),
        ({"--sd": flags["--ip_adapter"]}, "not a whole model"),
        ({"--out": tmp_path / "merged.bin"}, "merged.bin"),
        ({"--out": tmp_path / "taken" / "merged.ckpt"}, "taken"),
        ({"--dtype": "int8"}, "--dtype"),
        ({"--open_clip": "x"}, "unknown flag --open_clip; did you mean --open_clip_vit"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for change, expected in cases:
        status, said = outcome(MERGE, *words({**flags, **change}))
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

"""Configuration files: checked keys and types."""
from __future__ import annotations

import pytest

from ip_adapter.config import ROOT, InferenceConfig, load_config
from ldm.errors import UserError


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "inference").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_file_is_valid(path):
    assert isinstance(load_config(InferenceConfig, path), InferenceConfig)


@pytest.mark.parametrize("text, message", [
    ("sampling:\n  stps: 3", "stps"), ("sampling:\n  H: tall", "sampling.H"), ("name: [1, 2", "not valid YAML"),
    ("- 1\n- 2", "c.yaml"), (None, "no such file")])
def test_mistakes_are_named(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_config(InferenceConfig, path)
    assert "\n" not in str(error.value)

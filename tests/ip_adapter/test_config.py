"""Configuration files: checked keys and types."""
from __future__ import annotations

import pytest

from ip_adapter.config import ROOT, InferenceConfig, ModelConfig, TrainingConfig, load_config
from ldm.errors import UserError


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "inference").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_file_is_valid(path):
    assert isinstance(load_config(InferenceConfig, path), InferenceConfig)


@pytest.mark.parametrize("text, message", [
    ("sampling:\n  stps: 3", "stps"), ("sampling:\n  H: tall", "sampling.H"), ("name: [1, 2", "not valid YAML"),
    ("- 1\n- 2", "c.yaml"), (None, "no such file"), ("model: other.yaml", "other.yaml: no such file"),
    ("model:\n  heads: 3", "heads"),
    ("model:\n  image_activation: relu", "image_activation is 'relu', expected gelu, quick_gelu or ''")])
def test_mistakes_are_named(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_config(InferenceConfig, path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "training").glob("*.yaml")), ids=lambda path: path.name)
def test_every_training_is_of_a_model_for_inference(path):
    models = [load_config(InferenceConfig, other).model for other in (ROOT / "configs" / "inference").glob("*.yaml")]
    assert load_config(TrainingConfig, path).model in models


def test_a_model_named_by_its_file(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "m.yaml").write_text("model:\n  num_heads: 3\n  prediction: v\n")
    (tmp_path / "sub" / "c.yaml").write_text("model: ../m.yaml\nseed: 5\n")
    config = load_config(TrainingConfig, tmp_path / "sub" / "c.yaml")
    assert config.model == ModelConfig(num_heads=3, prediction="v") and config.seed == 5

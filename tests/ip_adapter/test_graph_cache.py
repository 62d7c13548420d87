"""Where compiled graphs are kept."""
from __future__ import annotations

from ip_adapter.build import build_model
from ip_adapter.cli import config_from, inference_parser
from ip_adapter.graph_cache import keep_run_graphs
from tests.conftest import DATA


def test_kept_graphs_are_told_apart(merged, tmp_path, monkeypatch):
    """By all that shapes a graph or the order of graphs, not by what goes through them."""
    for name in ("MS_COMPILER_CACHE_ENABLE", "MS_COMPILER_CACHE_PATH"):
        monkeypatch.setenv(name, "")  # to be taken back after the test
    _, config = config_from(["--ckpt_path", str(merged)])
    parser, model = inference_parser("", "1.5", config), build_model(merged, config.model)

    def folder(*words):
        args = parser.parse_args(["--img", str(DATA / "input.png"), *map(str, words)])
        return keep_run_graphs(tmp_path, model, args)

    plain = folder()
    for same in (["--prompt", "a cat"], ["--seed", 3], ["--scale", 5], ["--ip_scale", 0], ["--output_path", "here"]):
        assert folder(*same) == plain, same
    for other in (["--scale", 1], ["--n_samples", 2], ["--H", 64], ["--dtype", "float16"], ["--deep_every", 2],
                  ["--control_image", DATA / "hint.png", "--control_scale", 0.5]):
        assert folder(*other) != plain, other

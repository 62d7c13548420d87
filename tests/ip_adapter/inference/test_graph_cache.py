"""Where compiled graphs are kept."""
from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from ip_adapter.cli.inference import INFERENCE_SD, inference_parser
from ip_adapter.cli.parser import config_from
from ip_adapter.inference import graph_cache
from ip_adapter.inference.graph_cache import RunGraphs, run_graphs, use_graphs
from ip_adapter.weights.loading import build_model
from ldm.errors import UserError
from ldm.files import cache_folder, write_text
from tests.support.arrays import DATA


@pytest.fixture(scope="module")
def graphs_of(merged):
    """(folder, flags) -> the graphs of such a run."""
    _, config = config_from(["--ckpt_path", str(merged)], INFERENCE_SD)
    parser, model = inference_parser("", "1.5", config), build_model(merged, config.model)

    def graphs(folder, *words) -> RunGraphs | None:
        args = parser.parse_args(["--img", str(DATA / "input.png"), *map(str, words)])
        args.own_process = True
        args.graph_cache = folder if folder is not None else args.graph_cache
        return run_graphs(model, args)
    return graphs


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """To be taken back after each test."""
    for name in ("MS_COMPILER_CACHE_ENABLE", "MS_COMPILER_CACHE_PATH"):
        monkeypatch.setenv(name, "")


def test_kept_graphs_are_told_apart(graphs_of, tmp_path):
    """By all that shapes a graph or the order of graphs, not by what goes through them."""
    def folder(*words):
        return graphs_of(tmp_path, *words).path

    plain = folder()
    for same in (["--prompt", "a cat"], ["--seed", 3], ["--scale", 5], ["--ip_scale", 0], ["--output_path", "here"],
                 ["--sampling_steps", 7]):
        assert folder(*same) == plain, same
    for other in (["--scale", 1], ["--n_samples", 2], ["--H", 64], ["--dtype", "float16"], ["--deep_every", 2],
                  ["--control_image", DATA / "hint.png", "--control_scale", 0.5]):
        assert folder(*other) != plain, other
    assert folder("--deep_every", 2) != folder("--deep_every", 2, "--sampling_steps", 7)


def test_graphs_are_there_when_a_run_is_complete(graphs_of, tmp_path):
    """Two runs at once, another after them, and one that is stopped."""
    first, second = graphs_of(tmp_path), graphs_of(tmp_path)
    for n, graphs in enumerate((first, second)):
        graphs.use()
        assert not graphs.kept and os.environ["MS_COMPILER_CACHE_PATH"] == str(graphs.new)
        (graphs.new / "graph").write_text(str(n))
    for graphs in (first, second):
        graphs.keep()
        assert (graphs.path / "graph").read_text() == "0" and not graphs.new.exists()
    third = graphs_of(tmp_path)
    third.use()
    third.keep()
    assert os.environ["MS_COMPILER_CACHE_PATH"] == str(third.path)
    stopped = graphs_of(tmp_path, "--H", 64)
    stopped.use()
    assert not graphs_of(tmp_path, "--H", 64).kept


def keep(graphs, content: bytes = b"compiled") -> RunGraphs:
    """As a run does."""
    graphs.use()
    if not graphs.kept:
        (graphs.new / "rank_0").mkdir()
        (graphs.new / "rank_0" / "graph.mindir").write_bytes(content)
    graphs.keep()
    return graphs


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "rank_0" / "graph.mindir").write_bytes(b"compilee"),
    lambda folder: (folder / "rank_0" / "graph.mindir").write_bytes(b""),
    lambda folder: (folder / "rank_0" / "graph.mindir").unlink(),
    lambda folder: (folder / "rank_0" / "another.mindir").write_bytes(b"compiled"),
    lambda folder: (folder / "sums.json").write_bytes(b'{"rank_0'),
    lambda folder: (folder / "sums.json").unlink()])
def test_damaged_graphs_are_compiled_anew(graphs_of, tmp_path, damage, caplog):
    path = keep(graphs_of(tmp_path)).path
    assert graphs_of(tmp_path).kept and not caplog.records
    damage(path)
    assert not graphs_of(tmp_path).kept and "are damaged; they are compiled anew" in caplog.text
    keep(graphs_of(tmp_path), b"again")
    assert graphs_of(tmp_path).kept and (path / "rank_0" / "graph.mindir").read_bytes() == b"again"
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_keeping_graphs_never_raises(graphs_of, tmp_path, monkeypatch):
    """Two runs that end together, a folder that is gone, a full disk."""
    first, second, gone, full = (graphs_of(tmp_path / name) for name in ("two", "two", "gone", "full"))
    for graphs in (first, second, gone, full):
        graphs.use()
        (graphs.new / "graph").write_text("compiled")

    def meanwhile(*words):
        monkeypatch.undo()
        first.keep()
        write_text(*words)
    monkeypatch.setattr(graph_cache, "write_text", meanwhile)
    second.keep()
    assert (first.path / "graph").is_file() and not second.unfinished.exists()
    shutil.rmtree(tmp_path / "gone")
    gone.keep()
    monkeypatch.setattr(graph_cache, "write_text", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    full.keep()
    assert not full.kept and not full.unfinished.exists()


def test_no_home_no_graphs(graphs_of, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no HOME, and nobody of this number
    assert cache_folder() is None and graphs_of(None) is None


def test_the_oldest_graphs_are_forgotten(graphs_of, tmp_path, monkeypatch):
    monkeypatch.setattr(graph_cache, "KEPT", 2)
    mine = tmp_path / "notes"
    mine.mkdir()
    runs = [graphs_of(tmp_path, "--H", height) for height in (64, 72, 80)]
    for age, graphs in enumerate(runs[:2]):
        graphs.use()
        graphs.keep()
        os.utime(graphs.path, (age, age))
    left, fresh = tmp_path / f"{'0' * 16}-1", tmp_path / f"{'0' * 16}-2"
    for path in (left, fresh):
        path.mkdir()
    os.utime(left, (0, 0))
    runs[0].use()  # the older one is used again
    runs[2].use()
    runs[2].keep()
    assert [graphs.kept for graphs in runs] == [True, False, True]
    assert mine.is_dir() and fresh.is_dir() and not left.exists()


def test_where_graphs_are_kept(graphs_of, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert graphs_of(None).path.parent == tmp_path / "ip_adapter"
    assert graphs_of(None, "--graph_cache", "none") is None
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert graphs_of(None).path.parent == Path.home() / ".cache" / "ip_adapter"
    monkeypatch.setattr(graph_cache, "on_ascend", lambda: True)
    assert graphs_of(None) is None and graphs_of(tmp_path).path.parent == tmp_path


def test_a_folder_that_cannot_be_written_to(graphs_of, merged, tmp_path, monkeypatch):
    """Is the user's mistake where it was asked for, and no cache otherwise."""
    (tmp_path / "ip_adapter").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _, config = config_from(["--ckpt_path", str(merged)], INFERENCE_SD)
    args = inference_parser("", "1.5", config).parse_args(["--img", str(DATA / "input.png")])
    assert use_graphs(graphs_of(None), args) is None
    args.graph_cache = tmp_path / "ip_adapter"
    with pytest.raises(UserError, match="--graph_cache .*: cannot write there"):
        use_graphs(graphs_of(args.graph_cache), args)

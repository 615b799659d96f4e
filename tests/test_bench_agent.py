"""The benchmarks of part I run, and their peers compute what ours compute."""
import sys

import pytest
import torch
from torch.testing import assert_close

from memory_notebook.runs import run_experiment


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_maml_loop_is_the_same_computation():
    from memory_notebook.agent.meta import MetaLearner, sine_net, sinusoids
    from memory_notebook.bench.maml import loop_loss
    torch.manual_seed(0)
    learner = MetaLearner(sine_net().double(), inner_steps=2)
    x, y, _ = (t.double() for t in sinusoids(4, 12))
    data = x[:, :6], y[:, :6], x[:, 6:], y[:, 6:]
    assert_close(loop_loss(learner, *data), learner.outer_losses(*data).mean())


def test_bench_maml(one_thread):
    from memory_notebook.bench.maml import bench_maml
    timed = run_experiment(bench_maml, out=None, turns=1, tasks=16)["metrics"]
    names = ("speedup_vs_loop", "vmap_ms", "loop_ms")
    assert set(timed) == {f"maml.{k}{tail}" for k in names for tail in ("", "_1_step")}
    assert timed["maml.speedup_vs_loop"] > 1


def test_bench_replay(one_thread):
    from memory_notebook.bench.replay import bench_replay, replay_table
    quick = run_experiment(bench_replay, out=None, sizes=(100_000,), widths=(1, 2), repeats=40)["metrics"]
    assert quick["replay.100k.tree_us"] < quick["replay.100k.deque_us"]
    assert quick["replay.speedup_vs_deque_100k"] > 1 and "replay.100k.w2.tree_us" in quick
    assert "deque / tree" in replay_table(quick)


def test_bench_replay_without_cpprb(one_thread, monkeypatch):
    from memory_notebook.bench.replay import bench_replay, replay_table
    monkeypatch.setitem(sys.modules, "cpprb", None)
    without = run_experiment(bench_replay, out=None, sizes=(2000,), widths=(1,), repeats=2)["metrics"]
    assert not [k for k in without if "cpprb" in k]
    assert "pip install cpprb" in replay_table(without)

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

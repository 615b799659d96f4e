"""The machines beside the common way of writing them, their benchmarks in small, and long runs of each."""

import os
from copy import deepcopy

import pytest
import torch
from torch.testing import assert_close

from memory_notebook.bench import dnc, ntm
from memory_notebook.core import set_seed
from memory_notebook.machines.dnc import DNC
from memory_notebook.machines.ntm import NTM
from memory_notebook.runs import peak_mb, run_experiment

STEPS = 100_000 if os.environ.get("MEMORY_NOTEBOOK_SLOW") else 10_000  # minutes, or seconds
REPAIRED = {"masked": True, "dealloc": True, "sharpened": True}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_common_ntm_is_the_same_machine():
    set_seed(0)
    ours = NTM(9, 20, 16, 8, 8, read_heads=2)
    looped = ntm.looped(NTM(9, 20, 16, 8, 8, read_heads=2))
    looped.load_state_dict(ours.state_dict())
    x = torch.randn(3, 6, 9)
    assert_close(looped(x)[0], ours(x)[0], rtol=1e-4, atol=1e-5)


def test_the_common_dnc_is_the_same_machine():
    set_seed(0)
    model = DNC(5, 16, 8, 6, 3, read_heads=2).double()
    looped = dnc.looped(deepcopy(model))
    x = torch.randn(3, 10, 5).double()
    fresh = model.init_state(3)
    start = fresh._replace(memory=torch.rand_like(fresh.memory))
    assert_close(looped(x, start)[0], model(x, start)[0])


def test_bench_ntm_in_small():
    got = run_experiment("benchmark:ntm", out=None, length=3, turns=2, batches=(1,), memory=False)["metrics"]
    assert got["ntm.speedup_b1"] > 1 and got["steps.ms_b1"] > 0
    assert {k.split(".")[0] for k in got} >= {"fused", "steps", "looped", "ntm"}


def test_bench_dnc_in_small():
    got = run_experiment(
        "benchmark:dnc", out=None, slots=(16,), batches=(2,), steps=6, turns=3, growth=(32, 64), memory=False
    )["metrics"]
    assert got["fused.ms_n16_b2"] > 0 and got["sparse.step_ms_n64"] > 0
    assert "fused.speedup_n16_b2" in got and "looped.seq_s_n16_b2" in got


@pytest.mark.parametrize(
    "module, small, large",
    [("bench.ntm", ("fused", 1, 1), ("fused", 8, 20)),
     ("bench.dnc", ("fused", 16, 1, 2), ("fused", 64, 4, 20))]
)
def test_a_fresh_process_finds_the_contestant(module, small, large):
    assert peak_mb(module, small, large) >= 0


def all_finite(state):
    return all(v.isfinite().all() for v in state if isinstance(v, torch.Tensor))


def test_ntm_stays_finite():
    set_seed(0)
    model = NTM(8, 32, 32, 8)
    state = None
    with torch.no_grad():
        for _ in range(STEPS // 1000):
            y, state = model(10 * torch.randn(1, 1000, 8), state)
            assert y.isfinite().all() and all_finite(state)


def test_dnc_stays_finite():
    set_seed(0)
    model = DNC(8, 32, 16, 8, **REPAIRED)
    state = None
    with torch.no_grad():
        for scale in (1, 10, 1000, 0, 100) * (STEPS // 5000):
            y, state = model(scale * torch.randn(1, 1000, 8), state)
            assert y.isfinite().all() and all_finite(state)
            assert state.write_weights.sum(-1).max() < 1 + 1e-4 and state.read_weights.sum(-1).max() < 1 + 1e-4

"""What the chapter on the delta rule leaves out: pickles, compilers, and the gradient under vmap."""

import pickle

import pytest
import torch
from torch.testing import assert_close

from memory_notebook import DeltaMemory, linear_memory, set_seed
from memory_notebook.speeds.delta import MEMORY_RULES


@pytest.fixture
def layer() -> DeltaMemory:
    set_seed(0)
    return DeltaMemory(8, heads=2, rule="titans", chunk_size=4)


def test_pickle(layer):
    x = torch.randn(2, 9, 8)
    assert_close(pickle.loads(pickle.dumps(layer))(x), layer(x))
    other = DeltaMemory(8, heads=2, rule="titans")
    other.load_state_dict(layer.state_dict())
    assert_close(other(x), layer(x))


@pytest.mark.parametrize("rule", ["titans", "gated_deltanet", "kda", "mesa"])
def test_compiled_is_eager(rule):
    set_seed(0)
    layer = DeltaMemory(8, heads=2, rule=rule, chunk_size=4)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 10, 8)
    y, state = layer(x)
    same, end = compiled(x)
    assert_close(same, y)
    assert_close(end, state)
    grads = lambda out: torch.autograd.grad(out.square().sum(), [p for p in layer.parameters()])
    assert_close(grads(same), grads(y))


def test_exported_is_eager(layer):
    x = torch.randn(2, 10, 8)
    mask = torch.rand(2, 10) > 0.3
    program = torch.export.export(layer, (x,), {"mask": mask})
    assert_close(program.module()(x, mask=mask), layer(x, mask=mask))


def test_vmap_and_per_sample_gradients(layer):
    x = torch.randn(3, 2, 10, 8)
    one = lambda part: layer(part)[0]
    assert_close(torch.vmap(one)(x), torch.stack([one(part) for part in x]))
    weights = dict(layer.named_parameters())
    loss = lambda w, part: torch.func.functional_call(layer, w, (part,))[0].square().sum()
    each = torch.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    for i, part in enumerate(x):
        alone = torch.func.grad(loss)(weights, part)
        assert_close({k: v[i] for k, v in each.items()}, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rule", list(MEMORY_RULES))
def test_half_precision_trains(rule):
    set_seed(0)
    layer = DeltaMemory(8, heads=2, rule=rule).bfloat16()
    layer(torch.randn(2, 40, 8).bfloat16())[0].float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_a_long_stream_stays_finite():
    g = torch.Generator().manual_seed(0)
    state = None
    for _ in range(20):
        k = torch.nn.functional.normalize(torch.randn(1, 1000, 8, generator=g), dim=-1)
        gates = [-torch.rand(1, 1000, generator=g) * 50 for _ in range(2)]
        y, state = linear_memory("titans", k, k, torch.randn(1, 1000, 8, generator=g), torch.rand(1, 1000, generator=g),
                                 *gates, state)
        assert y.isfinite().all() and state.memory.isfinite().all()

"""The machines beside the common way of writing them, their benchmarks in small, and long runs of each."""

import os
import pickle
import warnings
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

from memory_notebook.agent.oneshot import MANN
from memory_notebook.bench import dnc, ntm
from memory_notebook.core import map_state, set_seed
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


SIZE = {"hidden_size": 6, "memory_slots": 5, "slot_dim": 3}
MACHINES = {
    "ntm": lambda **options: NTM(3, output_size=4, **SIZE, **options),
    "dnc": lambda **options: DNC(3, output_size=4, read_heads=2, **SIZE, **options),
    "sparse": lambda **options: DNC(3, output_size=4, sparse_links=2, **SIZE, **options),
    "mann": lambda **options: MANN(3, 4, **SIZE, **options),
}
BACKENDS = ["eager", "aot_eager", *["inductor"] * bool(os.environ.get("MEMORY_NOTEBOOK_SLOW"))]
every = pytest.mark.parametrize("kind", MACHINES)


def built(kind, **options):
    set_seed(0)
    return MACHINES[kind](**options), torch.randn(3, 4, 3)


def leaves(state):
    "The tensors of a state in a row."
    found = []
    map_state(found.append, state)
    return found


def gradients(machine, y, **how):
    params = [*machine.parameters()]
    return torch.autograd.grad(y.square().sum(), params, allow_unused=True, materialize_grads=True, **how)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["ntm", "dnc", "mann"])
def test_a_compiled_machine_is_the_machine(kind, backend):
    machine, x = built(kind)
    torch._dynamo.reset()
    compiled = torch.compile(machine, backend=backend, fullgraph=True)
    state = None
    for batch in (x[:, :2], x[:, 2:]):
        want, end = machine(batch, state)
        y, got = compiled(batch, state)
        assert_close(y, want)
        assert_close(leaves(got), leaves(end))
        assert_close(gradients(machine, y), gradients(machine, want))
        state = end.detach()


@pytest.mark.parametrize("kind", ["ntm", "dnc", "mann"])
def test_an_exported_machine_is_the_machine(kind):
    machine, x = built(kind)
    exported = torch.export.export(machine, (x,), dynamic_shapes=({0: torch.export.Dim("b", min=2)},)).module()
    more = torch.randn(5, 4, 3)
    y, state = exported(more)
    want, end = machine(more)
    assert_close(y, want)
    assert_close(leaves(state), leaves(end))
    y.sum().backward()
    assert all(p.grad is not None for p in exported.parameters() if p.requires_grad)


@every
def test_a_compiled_machine_with_lengths(kind):
    machine, x = built(kind)
    torch._dynamo.reset()
    lengths = torch.tensor([2, 4, 3])
    y, state = torch.compile(machine, backend="eager", fullgraph=True)(x, lengths=lengths)
    want, end = machine(x, lengths=lengths)
    assert_close(y, want)
    assert_close(leaves(state), leaves(end))


@every
@pytest.mark.parametrize("fused", [True, False])
def test_a_state_changed_in_place_is_right_or_refused(kind, fused):
    machine, x = built(kind, fused=fused)
    done = torch.tensor([True, False, True])

    def two_chunks(begin):
        one, state = machine(x)
        two, _ = machine(x.flip(1), begin(state))
        return gradients(machine, one.square() + two.square())

    def in_place(state):
        for now, new in zip(leaves(state), leaves(machine.init_state(3))): now[done] = new[done]
        return state

    want = two_chunks(lambda state: machine.reset(state, done))
    try: got = two_chunks(in_place)
    except RuntimeError as error: assert "modified by an inplace operation" in str(error)
    else: assert_close(got, want)


@every
def test_a_state_of_another_machine_is_refused(kind):
    machine, x = built(kind)
    state = machine.init_state(3)
    for name in state._fields:
        field = getattr(state, name)
        wrong = map_state(lambda v: v[:1], field)
        for run, at in ((machine, x), (machine.cell, x[:, 0])):
            with pytest.raises(ValueError, match=rf"state\.{name}.* is \(1,.*expected \(3,"):
                run(at, state._replace(**{name: wrong}))
            with pytest.raises(ValueError, match=rf"state\.{name} is"): run(at, state._replace(**{name: None}))
    with pytest.raises(ValueError, match=f"expected a {type(state).__name__}"): machine(x, state[:2])
    assert_close(machine(x, tuple(state))[0], machine(x, state)[0])


@every
def test_layers_that_are_more_than_linear_are_called(kind):
    def after(change):
        machine, x = built(kind)
        change(machine.cell)
        machine.config.fused = False
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            slow = machine(x)[0]
        machine.config.fused = True
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            y = machine(x)[0]
            machine(x)
        assert len(said) == (kind != "mann")  # a MANN has only its steps
        assert_close(y, slow)
        assert (y - built(kind)[0](x)[0]).abs().max() > 1e-4
        y.sum().backward()

    after(lambda cell: cell.interface.register_forward_hook(lambda layer, args, out: 2 * out))
    after(lambda cell: cell.recurrent.register_forward_pre_hook(lambda layer, args: (3 * args[0],)))
    after(lambda cell: prune.l1_unstructured(cell.interface, "weight", 0.5))
    after(lambda cell: parametrizations.spectral_norm(cell.interface))


@every
def test_lora_and_int8(kind):
    peft = pytest.importorskip("peft")
    machine, x = built(kind)
    plain = machine(x)[0]
    names = ["input", "recurrent", "interface", "output"]
    config = peft.LoraConfig(target_modules=names, r=2, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(deepcopy(machine), config)
        y = tuned(x)[0]
        assert (y - plain).abs().max() > 1e-3
        y.sum().backward()
        assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)
        assert_close(tuned.merge_and_unload()(x)[0], y, rtol=1e-4, atol=1e-4)
        int8 = torch.ao.quantization.quantize_dynamic(machine, {nn.Linear}, dtype=torch.qint8)
        with torch.no_grad(): assert 0 < (int8(x)[0] - plain).abs().max() < 0.1


@every
def test_second_derivatives_and_transforms(kind):
    machine, x = built(kind, dtype=torch.float64)
    x = x.double()
    seconds = []
    for fused in (True, False):
        machine.config.fused = fused
        first = gradients(machine, machine(x[:, :2])[0], create_graph=True)
        seconds.append(gradients(machine, sum(v.square().sum() for v in first)))
    assert_close(*seconds)
    machine.config.fused = True
    machines = [MACHINES[kind](dtype=torch.float64) for _ in range(2)]
    params, _ = stack_module_state(machines)
    y = vmap(lambda p: functional_call(machine, p, x)[0])(params)
    assert_close(y, torch.stack([m(x)[0] for m in machines]))
    params = dict(machine.named_parameters())
    each = vmap(grad(lambda p, v: functional_call(machine, p, v[None])[0].square().sum()), (None, 0))(params, x)
    assert_close([v.sum(0) for v in each.values()], [*gradients(machine, machine(x)[0])])
    if kind == "sparse": return  # its links pass no gradient backward, and `no_grad` does not stop the forward mode
    _, slope = jvp(lambda v: machine(v)[0].sum(), (x,), (torch.ones_like(x),))
    v = x.clone().requires_grad_()
    assert_close(slope, torch.autograd.grad(machine(v)[0].sum(), v)[0].sum())


@every
def test_dtypes_devices_and_copies(kind):
    machine, x = built(kind)
    with torch.autocast("cpu", torch.bfloat16):
        _, state = machine.cell(x[:, 0])
        step, state = machine.cell(x[:, 1], state)
        whole, _ = machine(x[:, :2])
    assert state.memory.dtype == torch.float32
    assert_close(step, whole[:, 1], rtol=0, atol=0.02)
    for dtype in (torch.bfloat16, torch.float64):
        other = MACHINES[kind](dtype=dtype)
        y, _ = other(x.to(dtype))
        y.sum().backward()
        assert y.dtype == dtype and other.cell(x[:, 0].to(dtype))[0].dtype == dtype
    ghost = MACHINES[kind](device="meta")
    y, state = ghost(x.to("meta"))
    assert y.is_meta and state.memory.is_meta and y.shape == (3, 4, 4)
    assert machine(x[:0])[0].shape == (0, 4, 4)
    want = machine(x)[0]
    for copy in (deepcopy(machine), pickle.loads(pickle.dumps(machine))): assert_close(copy(x)[0], want)
    assert_close(machine(x.transpose(0, 1).contiguous().transpose(0, 1))[0], want)


@every
def test_tapes_go_with_the_backward_pass(kind):
    machine, x = built(kind)
    losses = [machine(x)[0].sum() for _ in range(3)]
    nodes = []
    seen = set()

    def look(node):
        if node is None or node in seen: return
        seen.add(node)
        if hasattr(node, "z"): nodes.append(node)
        for before, _ in node.next_functions: look(before)

    for loss in losses: look(loss.grad_fn)
    losses[0].backward(retain_graph=True)
    for loss in losses: loss.backward()
    assert len(nodes) == (0 if kind == "mann" else 3) and all(node.z is None for node in nodes)
    with pytest.raises(RuntimeError, match="second time"): losses[0].backward()


@every
def test_called_like_an_lstm(kind):
    machine, x = built(kind)
    lstm = nn.LSTM(3, 4, batch_first=True)
    assert machine(x)[0].shape == lstm(x)[0].shape
    assert machine(x[0])[0].shape == lstm(x[0])[0].shape
    assert_close(machine(x[0])[0], machine(x)[0][0])
    first = MACHINES[kind](batch_first=False)
    first.load_state_dict(machine.state_dict())
    assert_close(first(x.transpose(0, 1))[0], machine(x)[0].transpose(0, 1))
    assert_close(first(x[0])[0], machine(x[0])[0])
    lengths = torch.tensor([2, 4, 1])
    for ordered in (False, True):
        order = lengths.argsort(descending=True) if ordered else torch.arange(3)
        packed = pack_padded_sequence(x[order], lengths[order], batch_first=True, enforce_sorted=ordered)
        y, state = machine(packed)
        theirs, _ = lstm(packed)
        assert_close(list(y[1:]), list(theirs[1:]))
        assert y.data.shape == theirs.data.shape
        back, _ = pad_packed_sequence(y, batch_first=True)
        for row, i in enumerate(order):
            alone, end = machine(x[i, :lengths[i]])
            assert_close(back[row, :lengths[i]], alone)
            assert_close(map_state(lambda v: v[row], state), end)  # noqa: B023


@every
def test_layers_dropout_and_learned_memory(kind):
    set_seed(0)
    machine = MACHINES[kind](num_layers=3, dropout=0.5, learned_memory=True)
    x = torch.randn(3, 4, 3)
    assert not torch.equal(machine(x)[0], machine(x)[0])
    machine.eval()
    y, state = machine(x)
    below = x
    for cell in machine.cells: below, _ = cell.sequence(below)
    assert_close(y, below)
    assert len(state) == 3 and y.shape == (3, 4, 4)
    first, state = machine(x[:, :1])
    second, state = machine(x[:, 1:], state)
    assert_close(torch.cat([first, second], 1), y)
    y.sum().backward()
    assert all(cell.first_memory.grad.abs().sum() > 0 for cell in machine.cells)
    assert_close(machine.reset(state, torch.ones(3, dtype=torch.bool)), machine.init_state(3))
    with pytest.raises(ValueError, match="state is of 2 layers: expected 3"): machine(x, state[:2])
    with pytest.raises(TypeError, match="has no option 'bidirectional': choose from input_size"):
        MACHINES[kind](bidirectional=True)


@every
def test_a_mask_wherever_it_stands(kind):
    machine, x = built(kind)
    mask = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    y, state = machine(x.masked_fill(~mask.unsqueeze(-1), torch.nan), mask=mask)
    for i in range(3):
        alone, end = machine(x[i][mask[i]])
        assert_close(y[i][mask[i]], alone)
        assert_close(map_state(lambda v: v[i], state), end)  # noqa: B023
    assert (y[~mask] == 0).all()
    with pytest.raises(ValueError, match=r"mask is \(3, 3\): expected \(3, 4\)"): machine(x, mask=mask[:, :3])
    with pytest.raises(ValueError, match="from 0 to 4"): machine(x, lengths=[5, 1, 1])


@every
def test_gru_controller(kind):
    if kind == "mann": return  # it has an LSTM
    machine, x = built(kind, controller="gru")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it has its steps only, and need not say so
        y, state = machine(x)
    steps = []
    s = None
    for now in x.unbind(1):
        out, s = machine.cell(now, s)
        steps.append(out)
    assert_close(y, torch.stack(steps, 1))
    assert state.cell is None and torch.autograd.grad(y.sum(), machine.cell.recurrent.weight)[0].abs().sum() > 0


def test_a_cell_with_a_step_of_its_own_is_heard():
    class Quiet(type(NTM(3).cell)):
        def step(self, driven, state):
            out, state = super().step(driven, state)
            return 0 * out, state

    machine, x = built("ntm")
    machine.cell.__class__ = Quiet
    with pytest.warns(UserWarning, match="Quiet goes step by step"): y, _ = machine(x)
    assert_close(y, machine.cell.output.bias.expand_as(y))

"""A Neural Turing Machine against the clock: by hand, through autograd, as it is commonly written, and pytorch-ntm."""

import importlib.util
from functools import partial
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memory_notebook.machines.ntm import NTM, NTMCell, NTMConfig, NTMState
from memory_notebook.runs import Run, benchmark, peak_mb, race


def _address(config: NTMConfig, memory: Tensor, before: Tensor, emit: Callable[[str], Tensor]) -> Tensor:
    "Where one head looks."
    key = emit("keys")
    if config.bounded: key = torch.tanh(key)
    similar = F.cosine_similarity(memory + 1e-16, key.unsqueeze(1) + 1e-16, dim=-1)
    content = torch.softmax(F.softplus(emit("strengths")) * similar, 1)
    gate = torch.sigmoid(emit("gates"))
    kernel = torch.softmax(emit("shifts"), 1)
    blended = gate * content + (1 - gate) * before
    s = config.max_shift
    around = [torch.cat([w[-s:], w, w[:s]]) for w in blended]
    moved = torch.stack([F.conv1d(w.view(1, 1, -1), k.view(1, 1, -1)).view(-1) for w, k in zip(around, kernel)])
    power = moved ** (1 + F.softplus(emit("gammas")))
    return power / (power.sum(1, keepdim=True) + 1e-16)


def _looped_step(self: NTMCell, driven: Tensor, state: NTMState) -> tuple[Tensor, NTMState]:
    "A step as it is commonly written: head by head, the shift sequence by sequence."
    hidden, cell, reads, memory, weights = state
    o, i, f, g = (driven + F.linear(torch.cat([hidden, *reads.unbind(1)], -1), self.recurrent.weight)).chunk(4, -1)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    hidden = torch.sigmoid(o) * torch.tanh(cell)
    weight = self.layout.split(self.interface.weight.T)
    bias = self.layout.split(self.interface.bias)
    emit = lambda j, name: hidden @ getattr(weight, name)[:, j] + getattr(bias, name)[j]
    r = self.config.read_heads
    addresses = []
    fetched = []
    for j in range(self.layout.heads):
        address = _address(self.config, memory, weights[:, j], partial(emit, j))
        addresses.append(address)
        if j < r:
            fetched.append(torch.matmul(address.unsqueeze(1), memory).squeeze(1))
            continue
        erase = torch.sigmoid(emit(j - r, "erases"))
        add = emit(j - r, "adds")
        if self.config.bounded: add = torch.tanh(add)
        column = address.unsqueeze(-1)
        memory = memory * (1 - torch.matmul(column, erase.unsqueeze(1))) + torch.matmul(column, add.unsqueeze(1))
    reads = torch.stack(fetched, 1)
    return torch.cat([hidden, *fetched], -1), NTMState(hidden, cell, reads, memory, torch.stack(addresses, 1))


def looped(model: NTM) -> NTM:
    "Turn a machine into one that does its steps as they are commonly written; its weights stay."
    model.config.fused = False
    model.cell.step = partial(_looped_step, model.cell)
    return model


class _PytorchNTM(nn.Module):
    "pytorch-ntm of the paper's size, from a clone on the Python path, with the weights of one of our cells."

    def __init__(self, cell: NTMCell):
        super().__init__()
        from ntm.aio import EncapsulatedNTM

        c = cell.config
        self.machine = EncapsulatedNTM(c.input_size, c.output_size, c.hidden_size, 1, 1, c.memory_slots, c.slot_dim)
        with torch.no_grad():
            self._copy_lstm(cell, c.hidden_size)
            self._copy_heads(cell)

    def _copy_lstm(self, cell: NTMCell, hidden_size: int) -> None:
        lstm = self.machine.ntm.controller.lstm
        reorder = lambda v: torch.cat([v.chunk(4)[i] for i in (1, 2, 3, 0)])
        lstm.weight_ih_l0.copy_(reorder(torch.cat([cell.input.weight, cell.recurrent.weight[:, hidden_size:]], 1)))
        lstm.bias_ih_l0.copy_(reorder(cell.input.bias))
        lstm.weight_hh_l0.copy_(reorder(cell.recurrent.weight[:, :hidden_size]))
        lstm.bias_hh_l0.zero_()

    def _copy_heads(self, cell: NTMCell) -> None:
        reader, writer = self.machine.ntm.heads
        for kind in ("weight", "bias"):
            v = cell.layout.split(getattr(cell.interface, kind).T)
            head = lambda j: [u[..., j, :] for u in (v.keys, v.strengths, v.gates, v.shifts, v.gammas)]  # noqa: B023
            getattr(reader.fc_read, kind).copy_(torch.cat(head(0), -1).T)
            getattr(writer.fc_write, kind).copy_(torch.cat([*head(1), v.erases[..., 0, :], v.adds[..., 0, :]], -1).T)
            getattr(self.machine.ntm.fc, kind).copy_(getattr(cell.output, kind))

    def forward(self, x: Tensor, state: NTMState) -> tuple[Tensor, None]:
        "Probabilities (b, t, d_out), from one of our states."
        m = self.machine
        m.init_sequence(len(x))
        m.memory.memory = state.memory
        m.previous_state = [*state.reads.unbind(1)], (state.hidden[None], state.cell[None]), [*state.weights.unbind(1)]
        return torch.stack([m(now)[0] for now in x.unbind(1)], 1), None


def contestant(kind: str, batch: int, length: int) -> Callable[[], float]:
    "Runs forward and backward once: fused, steps, compiled, looped or pytorch_ntm, with the same weights and string."
    torch.manual_seed(0)
    x = (torch.rand(batch, 2 * length + 1, 9) > 0.5).float()
    target = x[:, :length, :8]
    model = NTM(9, output_size=8, bounded=False, init="plain", fused=kind == "fused", compile=kind == "compiled")
    state = model.init_state(batch)
    if kind == "looped": looped(model)
    if kind == "pytorch_ntm": model = _PytorchNTM(model.cell)
    loss_fn = F.binary_cross_entropy if kind == "pytorch_ntm" else F.binary_cross_entropy_with_logits

    def run() -> float:
        model.zero_grad()
        loss = loss_fn(model(x, state)[0][:, length + 1:], target)
        loss.backward()
        return loss.item()

    return run


_contestant = contestant  # the name by which `peak_mb` finds it in a fresh process


@benchmark(
    "ntm",
    help="a Neural Turing Machine forward and backward: by hand, through autograd, and as it is commonly written",
)
def bench_ntm(
    run: Run,
    *,
    length: int = 20,  # vectors to copy; a string takes twice as many steps and one
    batches: tuple[int, ...] = (1, 32),
    turns: int = 9,  # medians over so many
    compiled: bool = False,  # a further column: each step compiled (minutes to compile)
    memory: bool = True,  # measure peak memory in fresh processes
) -> dict:
    "Milliseconds, sequences a second, megabytes, and how many times faster than the common way."
    common = "pytorch_ntm" if importlib.util.find_spec("ntm") else "looped"
    kinds = ["fused", "steps", *["compiled"] * compiled, *dict.fromkeys([common, "looped"])]
    out = {}
    for b in batches:
        runs = {k: contestant(k, b, length) for k in kinds}
        losses = {k: f() for k, f in runs.items()}  # also the warm-up
        if max(losses.values()) - min(losses.values()) > 1e-4:
            raise RuntimeError(f"the contestants disagree: losses {losses}")
        seconds = race(runs, turns)
        for k, s in seconds.items(): out |= {f"{k}.ms_b{b}": 1000 * s, f"{k}.seq_s_b{b}": b / s}
        if memory: out |= {f"{k}.mb_b{b}": peak_mb("bench.ntm", (k, 1, 1), (k, b, length)) for k in kinds}
        out[f"ntm.speedup_b{b}"] = seconds[common] / seconds["fused"]
        out[f"ntm.steps_speedup_b{b}"] = seconds[common] / seconds["steps"]
        if compiled: out[f"ntm.compiled_speedup_b{b}"] = seconds[common] / seconds["compiled"]
        run.log(f"batch {b}: {out[f'ntm.speedup_b{b}']:.1f} times faster than {common}")
    return out

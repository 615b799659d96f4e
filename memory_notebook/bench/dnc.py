"""A DNC against the clock: by hand, through autograd, as it is commonly written, and the package `dnc`."""

import importlib.util
from functools import partial
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memory_notebook.machines.dnc import DNC, DNCCell, DNCInterface, DNCState
from memory_notebook.runs import Run, benchmark, peak_mb, race


def _write(p: DNCInterface, s: DNCState) -> tuple[Tensor, Tensor]:
    "Usage and write weights, the common way."
    kept = torch.ones_like(s.usage)
    for j in range(s.read_weights.shape[1]): kept = kept * (1 - p.free_gates[:, j] * s.read_weights[:, j])
    usage = (s.usage + s.write_weights - s.usage * s.write_weights) * kept
    rising, order = torch.sort(usage, dim=-1, stable=True)
    before = torch.cat([torch.ones_like(rising[:, :1]), torch.cumprod(rising, -1)[:, :-1]], -1)
    allocated = torch.gather((1 - rising) * before, 1, torch.argsort(order, -1))
    similar = F.cosine_similarity(s.memory + 1e-16, p.keys[:, -1:] + 1e-16, dim=-1)
    content = torch.softmax(p.strengths[:, -1] * similar, -1)
    gate = p.allocation_gate[:, 0]
    return usage, p.write_gate[:, 0] * (gate * allocated + (1 - gate) * content)


def _link(s: DNCState, w: Tensor) -> tuple[Tensor, Tensor]:
    "Links and precedence, every matrix in full."
    n = w.shape[1]
    row = w.unsqueeze(-1).expand(-1, n, n)
    column = w.unsqueeze(1).expand(-1, n, n)
    links = (1 - row - column) * s.links + row * s.precedence.unsqueeze(1)
    return links * (1 - torch.eye(n, device=w.device)), (1 - w.sum(1, keepdim=True)) * s.precedence + w


def _looped_step(self: DNCCell, driven: Tensor, state: DNCState) -> tuple[Tensor, DNCState]:
    "A step as it is commonly written: head by head, every matrix in full."
    s = state
    gates = driven + F.linear(torch.cat([s.hidden, *s.reads.unbind(1)], -1), self.recurrent.weight)
    o, i, f, g = gates.chunk(4, -1)
    cell = torch.sigmoid(f) * s.cell + torch.sigmoid(i) * torch.tanh(g)
    hidden = torch.sigmoid(o) * torch.tanh(cell)
    p = self.layout.activate(self.interface(hidden))
    usage, w = _write(p, s)
    memory = s.memory * (1 - w.unsqueeze(-1) * p.erase) + w.unsqueeze(-1) * p.write_vector
    links, precedence = _link(s, w)
    addresses = []
    fetched = []
    for j in range(self.config.read_heads):
        similar = F.cosine_similarity(memory + 1e-16, p.keys[:, j:j + 1] + 1e-16, dim=-1)
        content = torch.softmax(p.strengths[:, j] * similar, -1)
        before = s.read_weights[:, j].unsqueeze(-1)
        onward = torch.matmul(links, before).squeeze(-1)
        backward = torch.matmul(links.transpose(1, 2), before).squeeze(-1)
        mode = p.modes[:, j]
        addresses.append(mode[:, :1] * backward + mode[:, 1:2] * content + mode[:, 2:] * onward)
        fetched.append(torch.matmul(addresses[j].unsqueeze(1), memory).squeeze(1))
    reads = torch.stack(fetched, 1)
    new = DNCState(hidden, cell, reads, memory, usage, torch.stack(addresses, 1), w, precedence, links)
    return torch.cat([hidden, *fetched], -1), new


def looped(model: DNC) -> DNC:
    "Turn a machine into one that does its steps as they are commonly written; its weights stay."
    model.config.fused = False
    model.cell.step = partial(_looped_step, model.cell)
    return model


_SIZE = {"hidden_size": 128, "slot_dim": 32, "output_size": 8, "read_heads": 4}


def _peer(n: int) -> nn.Module:
    "The `dnc` package's machine of the same size."
    from dnc import DNC as Peer

    return Peer(
        input_size=9,
        hidden_size=_SIZE["hidden_size"],
        rnn_type="lstm",
        num_layers=1,
        num_hidden_layers=1,
        nr_cells=n,
        cell_size=_SIZE["slot_dim"],
        read_heads=_SIZE["read_heads"],
        batch_first=True,
        gpu_id=-1,
    )


def _ours(kind: str, n: int) -> DNC:
    "One of our forms of the machine."
    sparse = 8 if kind == "sparse" else None
    fused = kind in ("fused", "sparse")
    model = DNC(9, memory_slots=n, fused=fused, compile=kind == "compiled", sparse_links=sparse, **_SIZE)
    return looped(model) if kind == "looped" else model


def contestant(kind: str, n: int, batch: int, steps: int) -> Callable[[], float]:
    "Runs forward and backward once: fused, steps, compiled, looped (same weights), sparse, or the package dnc."
    torch.manual_seed(0)
    x = (torch.rand(batch, steps, 9) > .5).float()
    target = (torch.rand(batch, steps, 8) > .5).float()
    if kind == "dnc":
        machine = _peer(n)
        project = nn.Linear(9, 8)  # its output is as wide as its input
        answer = lambda: project(machine(x, (None, None, None), reset_experience=True)[0])
    else:
        machine = _ours(kind, n)
        state = machine.init_state(batch)
        answer = lambda: machine(x, state)[0]

    def run() -> float:
        machine.zero_grad()
        loss = F.binary_cross_entropy_with_logits(answer(), target)
        loss.backward()
        return loss.item()

    return run


_contestant = contestant  # the name by which `peak_mb` finds it in a fresh process


def growing(sizes: tuple[int, ...], steps: int, turns: int, memory: bool) -> dict[str, float]:
    "Dense against sparse links over the number of slots, one sequence at a time."
    out = {}
    for n in sizes:
        runs = {k: contestant(k, n, 1, steps) for k in ("fused", "sparse")}
        for f in runs.values(): f()  # warm-up
        for k, s in race(runs, turns).items():
            name = {"fused": "dense"}.get(k, k)
            out[f"{name}.step_ms_n{n}"] = 1000 * s / steps
            if memory: out[f"{name}.step_mb_n{n}"] = peak_mb("bench.dnc", (k, 16, 1, 2), (k, n, 1, steps)) / steps
        out[f"sparse.speedup_n{n}"] = out[f"dense.step_ms_n{n}"] / out[f"sparse.step_ms_n{n}"]
    return out


def _contest(kinds: list[str], common: str, n: int, b: int, steps: int, turns: int, memory: bool) -> dict[str, float]:
    "All contestants at one number of slots and one size of the batch."
    runs = {k: contestant(k, n, b, steps) for k in kinds}
    losses = {k: f() for k, f in runs.items()}  # also the warm-up
    ours = [v for k, v in losses.items() if k != "dnc"]  # dnc is another machine: its reads never reach the controller
    if max(ours) - min(ours) > 1e-4: raise RuntimeError(f"the contestants disagree: losses {losses}")
    at = f"n{n}_b{b}"
    seconds = race(runs, turns)
    out = {}
    for k, s in seconds.items(): out |= {f"{k}.ms_{at}": 1000 * s, f"{k}.seq_s_{at}": b / s}
    if memory: out |= {f"{k}.mb_{at}": peak_mb("bench.dnc", (k, 16, 1, 2), (k, n, b, steps)) for k in kinds}
    for k in kinds:
        if k not in (common, "looped"): out[f"{k}.speedup_{at}"] = seconds[common] / seconds[k]
    if memory: out[f"fused.memory_share_{at}"] = out[f"fused.mb_{at}"] / out[f"{common}.mb_{at}"]
    return out


@benchmark(
    "dnc",
    help="a Differentiable Neural Computer forward and backward: by hand, autograd, as commonly written; sparse links",
)
def bench_dnc(
    run: Run,
    *,
    slots: tuple[int, ...] = (64, 256),
    batches: tuple[int, ...] = (1, 16, 32),
    steps: int = 40,
    turns: int = 9,  # medians over so many
    growth: tuple[int, ...] = (256, 512, 1024, 2048, 4096),  # slots, dense against sparse; one sequence of 10 steps
    compiled: bool = False,  # a further column: each step compiled (minutes to compile)
    looped: bool = True,  # the machine as commonly written, from this book
    memory: bool = True,  # measure peak memory in fresh processes
) -> dict:
    "Milliseconds, sequences a second, megabytes, and how many times faster than the package `dnc` or the common way."
    common = "dnc" if importlib.util.find_spec("dnc") else "looped"
    kinds = ["fused", "steps", *["compiled"] * compiled, *dict.fromkeys([common, *["looped"] * looped])]
    out = {}
    for n in slots:
        for b in batches:
            out |= _contest(kinds, common, n, b, steps, turns, memory)
            run.log(f"{n} slots, batch {b}: {out[f'fused.speedup_n{n}_b{b}']:.1f} times faster than {common}")
    return out | growing(growth, 10, turns, memory)

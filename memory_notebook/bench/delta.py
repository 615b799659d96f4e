"""A linear memory against the clock: in chunks, step by step, transformers, flash-linear-attention, titans-pytorch."""

import importlib.util
from pathlib import Path
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from memory_notebook.runs import Run, benchmark, peak_mb, race
from memory_notebook.speeds import delta
from memory_notebook.speeds.delta import DeltaMemory, linear_memory


def inputs(batch: int, heads: int, length: int, size: int) -> list[Tensor]:
    "Queries, keys of length one, values (b, h, t, size), write strength, log of the decay and of the momentum (b, h, t)."
    torch.manual_seed(0)
    draw = lambda *width: torch.randn(batch, heads, length, *width)
    gates = [draw().sigmoid(), F.logsigmoid(draw() + 4), F.logsigmoid(draw() - 2)]
    made = [draw(size), F.normalize(draw(size), dim=-1), draw(size), *gates]
    return [x.requires_grad_() for x in made]


def recurrence(q: Tensor, k: Tensor, v: Tensor, write: Tensor, log_decay: Tensor, log_momentum: Tensor | None) -> Tensor:
    "Step by step, as the equations stand: gated delta rule, or with momentum Titans."
    memory = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
    moving = memory
    reads = []
    for t in range(k.shape[2]):
        key = k[:, :, t, :, None]
        kept = log_decay[:, :, t, None, None].exp() * memory
        seen = kept if log_momentum is None else memory
        update = key * (write[:, :, t, None, None] * (v[:, :, t, None] - (key * seen).sum(-2, keepdim=True)))
        if log_momentum is not None: update = moving = log_momentum[:, :, t, None, None].exp() * moving + update
        memory = kept + update
        reads.append((q[:, :, t, :, None] * memory).sum(-2))
    return torch.stack(reads, 2)


def _walk_maps(x, writes, keys, stay, taken, move):
    "Instead of the walk: every chunk as one affine map of the memory, all maps made at once."
    step = keys.mT @ writes
    here = torch.diag_embed(stay.squeeze(-1)) - keys.mT @ taken
    if move is not None:
        w = move.shape[-2]
        here = here + F.pad(torch.diag_embed(move.squeeze(-1)), (w, 0, 0, w))
    starts = []
    for a, b in zip(here.unbind(1), step.unbind(1)):
        starts.append(x)
        x = torch.baddbmm(b, a, x)
    starts = torch.stack(starts, 1)
    return starts, writes - taken @ starts, x


class _Maps:
    "Stands in for the walk of `linear_memory`."
    apply = staticmethod(_walk_maps)


def affine(*args: Any, **options: Any) -> Tensor:
    "`linear_memory` by affine maps."
    walk = delta._Walk
    delta._Walk = _Maps
    try: return linear_memory(*args, **options)[0]
    finally: delta._Walk = walk


def _fla(part: str, function: str) -> Callable | None:
    "A reference of flash-linear-attention, read from its file: the package itself wants triton."
    found = importlib.util.find_spec("fla")
    if found is None or importlib.util.find_spec("einops") is None: return None
    file = Path(found.submodule_search_locations[0]) / "ops" / part / "naive.py"
    if not file.is_file(): return None
    spec = importlib.util.spec_from_file_location(f"fla_{part}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


def _peers(kind: str) -> dict[str, Callable]:
    "What others run on a processor, called with (q, k, v, write, log_decay, log_momentum), (b, h, t, ...) in and out."
    turn = lambda *xs: [x.transpose(1, 2) for x in xs]
    found = {}
    if kind == "gated":
        from transformers.models.qwen3_next import modeling_qwen3_next as qwen

        def transformers(q, k, v, write, log_decay, _):
            return qwen.torch_chunk_gated_delta_rule(*turn(q, k, v, log_decay, write))[0].transpose(1, 2)

        found["transformers"] = transformers
        if (theirs := _fla("gated_delta_rule", "naive_chunk_gated_delta_rule")) is not None:
            def fla(q, k, v, write, log_decay, _): return theirs(*turn(q, k, v, log_decay, write))[0].transpose(1, 2)

            found["fla"] = fla
    elif (momentum := _fla("momentum_delta_rule", "chunk_momentum_delta_rule_ref")) is not None:
        def fla_momentum(q, k, v, write, log_decay, log_momentum):
            q, k, v, a, m, eta = turn(q, k, v, log_decay, log_momentum, write)
            return momentum(q, k, v, k, a, m, torch.ones_like(eta), eta)[0].transpose(1, 2)

        found["fla_momentum"] = fla_momentum
    return found


def contestant(kind: str, rule: str, batch: int, heads: int, length: int, size: int, chunk: int = 32) -> Callable:
    "Runs forward and backward once: chunks, affine, recurrence or a peer, of the rule gated or titans."
    made = inputs(batch, heads, length, size)
    if rule == "gated": made[-1] = None
    name = {"gated": "gated_deltanet", "titans": "titans"}[rule]
    ours = {"chunks": lambda *x: linear_memory(name, *x, chunk_size=chunk)[0],
            "affine": lambda *x: affine(name, *x, chunk_size=chunk), "recurrence": recurrence}
    run_once = ours[kind] if kind in ours else _peers(rule)[kind]
    leaves = [x for x in made if x is not None]

    def run(backward: bool = True) -> Tensor:
        y = run_once(*made)
        if not backward: return y.detach()
        for x in leaves: x.grad = None
        y.square().sum().backward()
        return y.detach()

    return run


_contestant = contestant  # the name by which `peak_mb` finds it in a fresh process


def _layers(size: int, length: int) -> dict[str, Callable]:
    "Whole layers with momentum, forward and backward; titans-pytorch frozen, and corrected after every 64 steps."
    torch.manual_seed(0)
    x = torch.randn(1, length, size)
    layers = {"layer": DeltaMemory(size, rule="titans")}
    if importlib.util.find_spec("titans_pytorch") is not None:
        from titans_pytorch import MemoryMLP, NeuralMemory

        theirs = lambda every: NeuralMemory(size, chunk_size=64, batch_size=every, model=MemoryMLP(size, depth=1))
        layers |= {"frozen": theirs(None), "corrected": theirs(64)}

    def run(layer: torch.nn.Module) -> Callable:
        def once() -> None:
            layer.zero_grad()
            layer(x)[0].square().sum().backward()
        return once

    return {name: run(layer) for name, layer in layers.items()}


def _agree(outputs: dict[str, Tensor], size: int) -> float:
    "Largest distance from the first, relative to its largest value; peers that scale their queries are scaled back."
    first = next(iter(outputs.values()))
    scale = lambda name: size ** 0.5 if name in ("transformers", "fla", "fla_momentum") else 1.0
    off = {name: ((y * scale(name) - first).abs().max() / first.abs().max()).item() for name, y in outputs.items()}
    if max(off.values()) > 1e-4: raise RuntimeError(f"the contestants disagree: {off}")
    return max(off.values())


@benchmark(
    "delta",
    help="a linear memory forward and backward: in chunks, step by step, beside transformers and flash-linear-attention",
)
def bench_delta(
    run: Run,
    *,
    size: int = 64,  # width of keys and values
    length: int = 2048,
    turns: int = 9,  # medians over so many
    chunks: tuple[int, ...] = (16, 32, 64, 128),
    growth: tuple[int, ...] = (1024, 2048, 4096, 8192),  # lengths
    memory: bool = True,  # measure peak memory in fresh processes
) -> dict:
    "Milliseconds, megabytes, and how many times faster than each peer."
    out = {}
    for rule, title in (("gated", "delta"), ("titans", "titans")):
        made = lambda kind, *shape, **o: contestant(kind, rule, *shape, **o)  # noqa: B023
        runs = {k: made(k, 1, 1, length, size) for k in ("chunks", *_peers(rule), "affine")}
        out[f"{title}.largest_difference"] = _agree({k: f() for k, f in runs.items()}, size)
        seconds = race(runs, turns)
        out |= {f"{title}.{k}_ms": 1000 * s for k, s in seconds.items()}
        out |= {f"{title}.speedup_vs_{k}": s / seconds["chunks"] for k, s in seconds.items() if k != "chunks"}
        forward = race({k: lambda f=f: f(False) for k, f in runs.items()}, turns)
        out |= {f"{title}.{k}_forward_ms": 1000 * s for k, s in forward.items()}
        slow = made("recurrence", 1, 1, length, size)
        _agree({"chunks": runs["chunks"](), "recurrence": slow()}, size)
        seconds = race({"chunks": runs["chunks"], "recurrence": slow}, 3)
        out[f"{title}.recurrence_ms"] = 1000 * seconds["recurrence"]
        out[f"{title}.speedup_vs_recurrence"] = seconds["recurrence"] / seconds["chunks"]
        run.log(f"{title}: " + ", ".join(f"{k.partition('vs_')[2]} {v:.1f}" for k, v in out.items()
                                         if k.startswith(f"{title}.speedup")))
        by_chunk = {c: made("chunks", 1, 1, length, size, chunk=c) for c in chunks}
        _agree({f"chunk{c}": f() for c, f in by_chunk.items()}, size)
        out |= {f"{title}.chunk{c}_ms": 1000 * s for c, s in race(by_chunk, turns).items()}
        large = {k: made(k, 4, 4, length, size) for k in ("chunks", "affine")}
        for f in large.values(): f()
        seconds = race(large, 3)
        out |= {f"{title}.{k}_b4h4_ms": 1000 * s for k, s in seconds.items()}
        longer = {n: made("chunks", 1, 1, n, size) for n in growth}
        for f in longer.values(): f()
        out |= {f"{title}.t{n}_ms": 1000 * s for n, s in race(longer, turns).items()}
        if memory:
            for k in runs:
                out[f"{title}.{k}_mb"] = peak_mb("bench.delta", (k, rule, 1, 1, 64, 8), (k, rule, 1, 1, length, size))
    layers = _layers(size, length)
    for f in layers.values(): f()
    seconds = race(layers, turns)
    out |= {f"titans.{k}_ms": 1000 * s for k, s in seconds.items()}
    out |= {f"titans.speedup_vs_{k}": s / seconds["layer"] for k, s in seconds.items() if k != "layer"}
    return out

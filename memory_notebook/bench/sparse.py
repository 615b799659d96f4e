"""What a memory layer costs: ours, the package product-key-memory, and a feed-forward layer, a training step each."""

import importlib.util
import math
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import nn

from memory_notebook.runs import Run, benchmark, peak_mb, race
from memory_notebook.sparse.sparse import ProductKeyConfig, ProductKeyMemory, step_rows

PEER = "product_key_memory"


def _layer(kind: str, slots: int, dim: int) -> nn.Module:
    "Ours with sparse, dense or automatic gradients, the package product-key-memory, or a feed-forward layer."
    if kind == "ffn": return nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
    if kind == PEER:
        from product_key_memory import PKM
        return PKM(dim, heads=4, num_keys=math.isqrt(slots), topk=32, dim_head=128)
    return ProductKeyMemory(ProductKeyConfig(dim, slots, gated=False, gradient=kind))


def _contestant(
    kind: str,
    slots: int,
    tokens: int,
    dim: int = 256,
) -> Callable[..., Any]:  # runs "forward", "backward" or "step"
    "A layer, its input and its optimiser, ready to run."
    torch.manual_seed(0)
    x = torch.randn(4, tokens // 4, dim)
    model = _layer(kind, slots, dim)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    if kind in ("sparse", "auto"): step_rows(optimizer, model.values.weight)

    def run(part: str = "step") -> None:
        with torch.set_grad_enabled(part != "forward"): y = model(x)
        if part == "forward": return
        optimizer.zero_grad()
        y.square().mean().backward()
        if part == "step": optimizer.step()
    return run


def _traffic(slots: int, tokens: int, dim: int, turns: int) -> dict[str, float]:
    "Gigabytes a second: of rows read by the layer's kernel at random places, and of a plain copy."
    table = torch.randn(slots, dim)
    at = torch.randint(0, slots, (tokens, 128))
    weights = torch.rand(tokens, 128)
    target = torch.empty_like(table)
    runs = {
        "bag": lambda: F.embedding_bag(at, table, mode="sum", per_sample_weights=weights),
        "copy": lambda: target.copy_(table),
    }
    seconds = race(runs, turns)
    return {
        "bag_gb_s": at.numel() * dim * 4 / seconds["bag"] / 1e9,
        "copy_gb_s": 2 * table.nbytes / seconds["copy"] / 1e9,
    }


def _race_part(kinds: list[str], part: str, slots: int, tokens: int, turns: int) -> dict[str, float]:
    "Milliseconds of one part of a training step, for each kind of layer."
    contestants = {kind: _contestant(kind, slots, tokens) for kind in kinds}
    for run in contestants.values(): run(part)  # warm-up
    seconds = race({kind: lambda run=run: run(part) for kind, run in contestants.items()}, turns)
    return {kind: 1000 * s for kind, s in seconds.items()}


@benchmark("sparse", help="a memory layer from 2^14 to 2^20 slots: forward, backward, optimiser, beside "
                          "product-key-memory and a feed-forward layer")
def bench_sparse(run: Run, *,
    powers: tuple[int, ...] = (14, 16, 18, 20),  # slots are 2 to these, even numbers
    tokens: int = 1024,
    turns: int = 5,  # medians over so many
    memory: bool = True,  # measure peak memory in fresh processes
) -> dict:
    "Milliseconds of each part, megabytes, and how much faster than the package (without it: than a dense gradient)."
    peer = PEER if importlib.util.find_spec(PEER) else "dense"
    out = {}
    for p in powers:
        kinds = ["auto", "dense", "sparse", peer, "ffn"] if p <= 18 else ["auto", peer, "ffn"]
        kinds = list(dict.fromkeys(kinds))  # without the package the peer is there already
        for part in ("forward", "backward", "step"):
            times = _race_part(kinds, part, 2**p, tokens, turns)
            out |= {f"{kind}.{part}_ms_2p{p}": ms for kind, ms in times.items()}
        out[f"sparse.speedup_2p{p}"] = out[f"{peer}.step_ms_2p{p}"] / out[f"auto.step_ms_2p{p}"]
        out |= {f"{k}_2p{p}": v for k, v in _traffic(2**p, tokens, 256, turns).items()}
        if memory:
            for kind in ("auto", peer):
                out[f"{kind}.mb_2p{p}"] = peak_mb("bench.sparse", (kind, 2**10, 64), (kind, 2**p, tokens))
        run.log(f"2^{p} slots: {out[f'sparse.speedup_2p{p}']:.1f} times faster than {peer}")
    return out

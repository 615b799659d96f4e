"""Replay buffers side by side: ours, the usual two deques, a multinomial draw, and cpprb."""
import time
from collections import deque
from functools import partial
from itertools import cycle, product
from typing import Callable

import numpy as np
import torch
from torch import Tensor

from memory_notebook.agent.replay import ReplayBuffer
from memory_notebook.runs import Run, benchmark, text_table


class _Deques:
    "The usual buffer: two deques, probabilities made anew for each draw."
    def __init__(self, items, priority):
        self.items = deque(maxlen=len(priority))
        self.priority = deque(maxlen=len(priority))
        for item, p in zip(items, priority): self.push(item, p + 1e-6)

    def push(self, item, p):
        self.items.append(item)
        self.priority.append(p)

    def sample(self, n):
        p = np.array(self.priority, dtype=np.float32)
        return [self.items[i] for i in np.random.choice(len(self.items), n, p=p / p.sum())]


def _peers(x: Tensor, y: Tensor, priority: Tensor, n: int) -> dict[str, Callable]:
    "A draw from two deques, and one by torch.multinomial with batch and weights."
    deques = _Deques(zip(x, y), priority.tolist())
    p = (priority.double() + 1e-6) ** .6

    def multinomial():
        idx = torch.multinomial(p, n, replacement=True)
        q = p.index_select(0, idx)
        return x.index_select(0, idx), y.index_select(0, idx), (q.min() / q) ** .4

    return {
        "deque": lambda: deques.sample(n),
        "deque_push": lambda: deques.push((x[0], y[0]), 1.0),
        "multinomial": multinomial,
    }


def _medians(
    calls: dict[str, Callable | tuple],  # name -> function, or (untimed preparation, function)
    repeats: int,  # timed calls of each
    block: int = 10,  # calls in a row, of which the first is not counted
) -> dict[str, float]:  # name -> µs a call
    "Median time of each call, in blocks that take turns; `runs.race` has no untimed preparation before each call."
    times = {k: [] for k in calls}
    for _ in range(-(-repeats // (block - 1))):
        for k, call in calls.items():
            prepare, call = call if isinstance(call, tuple) else (None, call)
            for i in range(block):
                if prepare: prepare()
                start = time.perf_counter()
                call()
                if i: times[k].append(time.perf_counter() - start)
    return {k: float(np.median(t) * 1e6) for k, t in times.items()}


def _flush():
    "What a training step does to the caches."
    m = torch.ones(400, 400)
    for _ in range(5): m @ m


def _calls(name: str, update: Callable, sample: Callable, extend: Callable) -> dict[str, Callable | tuple]:
    "The calls that ours and cpprb have in common; a draw always follows an update."
    def cold():
        update()
        _flush()

    return {name: (update, sample), f"{name}_cold": (cold, sample), f"{name}_update": update, f"{name}_extend": extend}


def _cpprb(x: Tensor, y: Tensor, priority: Tensor, n: int, turn) -> dict[str, Callable | tuple]:
    "cpprb's calls; none if it is not installed."
    try: from cpprb import PrioritizedReplayBuffer
    except ImportError: return {}
    buffer = PrioritizedReplayBuffer(len(x), {"x": {"shape": x.shape[1]}, "y": {"dtype": np.int64}}, alpha=.6)
    x = x.numpy()
    y = y.numpy()
    buffer.add(x=x, y=y, priorities=priority.numpy())
    return _calls("cpprb", lambda: buffer.update_priorities(*(t.numpy() for t in next(turn))),
                  lambda: buffer.sample(n, .4), lambda: buffer.add(x=x[:n], y=y[:n]))


def _ours(x: Tensor, y: Tensor, priority: Tensor, n: int, turn) -> dict[str, Callable | tuple]:
    "Our calls, and the uniform draw."
    buffer = ReplayBuffer(len(x))
    uniform = ReplayBuffer(len(x), "uniform")
    buffer.extend(x, y, priority=priority)
    uniform.extend(x, y)
    calls = _calls(
        "tree", lambda: buffer.update(*next(turn)), lambda: buffer.sample(n), lambda: buffer.extend(x[:n], y[:n])
    )
    return calls | dict(uniform=lambda: uniform.sample(n), push=lambda: buffer.push((x[0], y[0])))


def _bench_size(size: int, batch: int, width: int, repeats: int, peers: bool) -> dict[str, float]:
    "µs a call at one size and item width."
    g = torch.Generator().manual_seed(size + width)
    x = torch.rand(size, width, generator=g)
    y = torch.arange(size) % 10
    priority = torch.rand(size, generator=g)
    turns = [(torch.randint(size, (batch,), generator=g), torch.rand(batch, generator=g)) for _ in range(64)]
    calls = _ours(x, y, priority, batch, cycle(turns)) | _cpprb(x, y, priority, batch, cycle(turns))
    row = _medians(calls | (_peers(x, y, priority, batch) if peers else {}), repeats)
    return {{"tree_update": "update", "tree_extend": "extend"}.get(k, k): v for k, v in row.items()}


def _size(n: int) -> str:
    "A size as in the names of metrics: 1m, 5k, 50."
    if n % 10**6 == 0: return f"{n // 10**6}m"
    return f"{n // 1000}k" if n % 1000 == 0 else str(n)


@benchmark("replay", help="draws, updates and additions of replay buffers, side by side")
def bench_replay(
    run: Run,
    *,
    sizes: tuple[int, ...] = (5_000, 100_000, 1_000_000),  # entries held
    batch: int = 128,  # experiences a draw
    widths: tuple[int, ...] = (1, 64),  # floats of an item; the first is compared with all peers, the others with cpprb
    repeats: int = 200,  # rounds, of which the median is taken
) -> dict:  # flat metrics, µs a call
    "Draws, updates and additions of replay buffers, side by side on one thread."
    metrics = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for size, width in product(sizes, widths):
            first = width == widths[0]
            at = _size(size) if first else f"{_size(size)}.w{width}"
            row = run.unit(at, partial(_bench_size, size, batch, width, repeats, first))
            metrics |= {f"replay.{at}.{k}_us": v for k, v in row.items()}
            for peer in ("deque", "cpprb"):
                if peer in row: metrics[f"replay.speedup_vs_{peer}_{at.replace('.', '_')}"] = row[peer] / row["tree"]
    finally: torch.set_num_threads(threads)
    return metrics


_ROWS = (
    "deque", "multinomial", "cpprb", "tree", "uniform", "cpprb_cold", "tree_cold",
    "cpprb_update", "update", "cpprb_extend", "extend", "deque_push", "push",
)


def replay_table(
    metrics: dict,  # what `bench_replay` returns
) -> str:
    "The figures as a table, µs a call, with the ratios to the peers."
    ats = [k.removeprefix("replay.").removesuffix(".tree_us") for k in metrics if k.endswith(".tree_us")]
    cell = lambda v: "-" if v is None else f"{v:,.1f}"
    rows = {k: [metrics.get(f"replay.{at}.{k}_us") for at in ats] for k in _ROWS}
    for peer in ("deque", "cpprb"):
        rows[f"{peer} / tree"] = [metrics.get(f"replay.speedup_vs_{peer}_{at.replace('.', '_')}") for at in ats]
    known = [[name, *map(cell, values)] for name, values in rows.items() if any(v is not None for v in values)]
    table = text_table([["µs a call", *ats], *known], numbers=True)
    if any(".cpprb_us" in k for k in metrics): return table
    return f"{table}\ncpprb is not installed, so its rows are missing: pip install cpprb"

"""A training step of the learner beside avalanche, the code of van de Ven et al. and bare matrix products.

The peers run their own loops in processes of their own, since they may need another interpreter. The parent hands the
source of `ticker`, `need_torchvision` and one `*_steps` function to the peer's interpreter, which need not know this
package, and images as MNIST's own files.
"""
import inspect
import math
import os
import struct
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, Callable, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from memory_notebook.continual.consolidation import EWC, fisher, slow_fisher
from memory_notebook.continual.families import ER
from memory_notebook.core import set_seed
from memory_notebook.data import load_digits, load_mnist
from memory_notebook.learner import MLP, Learner, Linear, onednn
from memory_notebook.runs import Run, benchmark, chosen, cpu_seconds, text_table
from memory_notebook.streams import Walk, split_stream

__all__ = ["bench_continual", "continual_table"]

METHODS = ("naive", "er", "ewc")


def ticker(steps: int) -> "Callable":
    "In a peer's process, called after each step: for a line on stdin it prints the seconds of the next `steps` steps."
    import os
    import sys
    import time
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the peer prints goes elsewhere
    left = 0
    start = 0.0
    def tick(*args, **kwargs):
        nonlocal left, start
        left -= 1
        if left > 0: return
        print(time.process_time() - start, file=out, flush=True)  # the first such line says: ready
        if not sys.stdin.readline(): os._exit(0)
        left = steps
        start = time.process_time()
    return tick


def need_torchvision() -> None:
    "In a peer's process: one thread, and torchvision also where, built for another torch, it has no operators."
    import torch
    torch.set_num_threads(1)
    try: import torchvision
    except RuntimeError:
        for op in ("nms", "qnms"):
            torch.library.define(f"torchvision::{op}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401


def avalanche_steps(tick: "Callable", method: str, folder: str) -> None:
    "Avalanche learns three contexts of Split MNIST, the third without end."
    need_torchvision()
    import torch
    from avalanche.benchmarks.classic import SplitMNIST
    from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
    from avalanche.training.supervised import EWC, Naive, Replay
    class Tick(SupervisedPlugin):
        def after_training_iteration(self, strategy, **kwargs):
            if strategy.clock.train_exp_counter == 2: tick()
    Linear = torch.nn.Linear
    ReLU = torch.nn.ReLU
    net = torch.nn.Sequential(torch.nn.Flatten(), Linear(784, 400), ReLU(), Linear(400, 400), ReLU(), Linear(400, 10))
    kinds = {"naive": (Naive, {}), "er": (Replay, {"mem_size": 1000}), "ewc": (EWC, {"ewc_lambda": 0.4})}
    kind, options = kinds[method]
    strategy = kind(
        model=net,
        optimizer=torch.optim.Adam(net.parameters(), 1e-3),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=128,
        plugins=[Tick()],
        evaluator=EvaluationPlugin(),
        **options,
    )
    stream = SplitMNIST(5, seed=0, dataset_root=folder + "/MNIST").train_stream
    strategy.train(stream[0])
    strategy.train(stream[1])
    strategy.train_epochs = 10**6
    strategy.train(stream[2])


def vandeven_steps(tick: "Callable", method: str, folder: str, clone: str, steps: int) -> None:
    "The training loop of van de Ven et al., with what their command line sets for Class-IL."
    need_torchvision()
    import sys

    import torch
    sys.path.insert(0, clone)
    from data.load import get_context_set
    from models.classifier import Classifier
    from train.train_task_based import train_cl
    (train, _), config = get_context_set("splitMNIST", "class", 5, data_dir=folder)
    net = Classifier(
        config["size"],
        config["channels"],
        config["output_units"],
        fc_layers=3,
        fc_units=400,
        fc_bn=False,
        excit_buffer=True,
    )
    net.scenario = "class"
    net.classes_per_context = 2
    net.optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    if method == "er":
        net.replay_mode = "buffer"
        net.use_memory_buffer = True
        net.budget_per_class = 100
        net.use_full_capacity = False
    if method == "ewc":
        net.weight_penalty = True
        net.offline = True
        net.reg_strength = 1e9
        net.fisher_n = 200
    train_cl(net, train, steps, 128, loss_cbs=[lambda *args, context, **kwargs: tick() if context > 2 else None])


class Peer:
    "A process in which another library takes steps when it is asked to."
    def __init__(self, python: str, steps: int, train: Callable, *args: Any):
        parts = [inspect.getsource(f) for f in (ticker, need_torchvision, train)]
        code = "\n".join([*parts, f"{train.__name__}(ticker({steps}), *{args!r})"])
        self.errors = tempfile.TemporaryFile("w+")
        pipe = subprocess.PIPE
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [python, "-c", code], stdin=pipe, stdout=pipe, stderr=self.errors, env=env, text=True
        )

    def ready(self) -> None:
        "Wait until it is where steps are timed."
        if self.process.stdout.readline(): return
        self.process.wait()
        self.errors.seek(0)
        raise RuntimeError((self.errors.read().strip().splitlines() or ["it ended"])[-1])

    def __call__(self) -> float:  # processor seconds of its steps
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline() or "nan")

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *error) -> None:
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.errors): file.close()


def write_mnist(
    data: tuple[Tensor, Tensor, Tensor, Tensor],  # x_train, y_train, x_test, y_test; pixels from 0 to 1
    folder: str | Path,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # images 28 by 28, flattened
    "Images as files of MNIST's format, where torchvision looks for them."
    raw = Path(folder) / "MNIST" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    out = []
    for part, x, y in (("train", *data[:2]), ("t10k", *data[2:])):
        x = x.flatten(1)
        side = math.isqrt(x.shape[1])
        x = F.interpolate(x.view(-1, 1, side, side), (28, 28)).flatten(1)
        pixels = (255 * x).round().byte().numpy().tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, len(x), 28, 28) + pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, len(y)) + y.byte().numpy().tobytes())
        out += [x, y]
    return tuple(out)


def timed(fn: Callable[[], Any], steps: int) -> Callable[[], float]:
    "A function that does `fn` so often and returns the processor seconds."
    def turn() -> float:
        with cpu_seconds() as spent:
            for _ in range(steps): fn()
        return spent()
    return turn


def own_step(method: str, data: tuple[Tensor, ...]) -> Callable[[], None]:
    "A step of our learner in the third context of Split MNIST, as `fit` takes it."
    set_seed(0)
    stream = split_stream(data, 5, 0)
    methods = {"naive": [], "er": [ER(1000, "per_class")], "ewc": [EWC(1e9, samples=1000)]}[method]
    learner = Learner(MLP(784, 10), methods=methods)
    learner.stream = stream
    learner.walk = Walk(stream, 128, 20, None, 0)
    learner.start(5)
    learner.learn_context()
    learner.learn_context()
    for m in learner.methods: m.before_context(learner)
    def step() -> None:
        learner.train_step(*stream.draw(stream.train, *learner.walk(learner.done, learner.step)))
        learner.step += 1
    return step


def matmul_step(product: Callable[[Tensor, Tensor], Tensor], batch: int = 128) -> Callable[[], None]:
    "The eight matrix products of a step of the same network, forward and backward; `product(x, w)` is x wᵀ."
    sizes = ((784, 400), (400, 400), (400, 10))
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(batch, inputs, generator=g) for inputs, _ in sizes]
    w = [torch.randn(outputs, inputs, generator=g) for inputs, outputs in sizes]
    d = [torch.randn(batch, outputs, generator=g) for _, outputs in sizes]
    def step() -> None:
        for i in range(3):
            product(x[i], w[i])
            product(d[i].t(), x[i].t())
        for i in (1, 2): product(d[i], w[i].t())
    return step


def fisher_seconds(data: tuple[Tensor, ...], rounds: int = 3, loop: int = 16, batch: int = 2048) -> tuple[float, float]:
    "Processor seconds of the exact Fisher information, for a sample: in closed form, and a loop by the faster library."
    set_seed(0)
    net = MLP(784, 10)
    x = data[0][:batch]
    layers = [m for m in net.modules() if isinstance(m, Linear)]
    runs = {
        "closed": (Linear.fast, timed(lambda: fisher(net, x), 1), len(x)),
        "loop": (Linear.fast, timed(lambda: slow_fisher(net, x[:loop], net), 1), loop),
        "loop by torch": (False, timed(lambda: slow_fisher(net, x[:loop], net), 1), loop),
    }
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (fast, turn, samples) in runs.items():
            for m in layers: m.fast = fast
            times[name].append(turn() / samples)
    middle = {name: median(values) for name, values in times.items()}
    return middle["closed"], min(middle["loop"], middle["loop by torch"])


def ready_peers(stack: ExitStack, run: Run, peers: dict[str, Peer]) -> dict[str, Peer]:
    "Peers that are ready; of the others it is said why not."
    for peer in peers.values(): stack.enter_context(peer)
    ready = {}
    for name, peer in peers.items():
        try:
            peer.ready()
            ready[name] = peer
        except RuntimeError as e: run.log(f"{name} is not timed: {e} (python= names an interpreter that has the peers)")
    return ready


@benchmark("continual", help="a training step beside avalanche, the code of van de Ven et al. and bare matrix products")
def bench_continual(
    run: Run,
    *,
    data: Literal["mnist", "digits"] = "mnist",  # digits: enlarged to 28 by 28, needs no download
    methods: tuple[str, ...] = METHODS,
    rounds: int = 9,  # turns of each
    steps: int = 25,  # in a turn
    # interpreter of a virtual environment with avalanche-lib and torchvision; None: this one
    python: str | None = None,
    vandeven: str | None = None,  # folder with a clone of github.com/GMvandeVen/continual-learning
) -> dict:
    "`continual.<naive|er|ewc>_speedup_vs_<avalanche|vandeven>`, `.fisher_speedup`, `.share_of_matmul`; ms of a step."
    methods = chosen(methods, METHODS, "method")
    if min(rounds, steps) < 1: raise ValueError(f"rounds is {rounds}, steps is {steps}: expected at least 1 of each")
    python = python or sys.executable
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            images = write_mnist(load_mnist() if data == "mnist" else load_digits(), folder)
            peers = {f"{m}_avalanche": Peer(python, steps, avalanche_steps, m, folder) for m in methods}
            if vandeven:
                more = (folder, vandeven, steps * (rounds + 1))
                peers |= {f"{m}_vandeven": Peer(python, steps, vandeven_steps, m, *more) for m in methods}
            else: run.log("the code of van de Ven et al. is not timed: name a clone of it with vandeven=")
            ready = ready_peers(stack, run, peers)
            tasks = {}
            for m in methods:
                tasks[f"{m}_ours"] = timed(own_step(m, images), steps)
                tasks |= {k: p for k, p in ready.items() if k.startswith(f"{m}_")}
            tasks["matmul_torch"] = timed(matmul_step(lambda x, w: x @ w.t()), steps)
            if Linear.fast: tasks["matmul_onednn"] = timed(matmul_step(onednn), steps)
            spent = {k: [] for k in tasks}
            for _ in range(rounds):
                for k, turn in tasks.items(): spent[k].append(1e3 * turn() / steps)
            return continual_metrics({k: median(v) for k, v in spent.items()}, fisher_seconds(images))
    finally: torch.set_num_threads(threads)


def continual_metrics(
    ms: dict[str, float],  # <method>_<who> -> milliseconds of a step
    fisher_s: tuple[float, float],  # as `fisher_seconds` returns them
) -> dict[str, float]:
    "Ratios of the times; shares are those of bare products in our plain step, by torch's own and the fastest library."
    out = {f"continual.{k}_ms": v for k, v in ms.items()}
    for k in ms:
        method, who = k.split("_")
        if who in ("avalanche", "vandeven"): out[f"continual.{method}_speedup_vs_{who}"] = ms[k] / ms[f"{method}_ours"]
    closed, loop = fisher_s
    out |= {
        "continual.fisher_us": 1e6 * closed,
        "continual.fisher_loop_us": 1e6 * loop,
        "continual.fisher_speedup": loop / closed,
    }
    if "naive_ours" in ms:
        fastest = min(v for k, v in ms.items() if k.startswith("matmul"))
        out["continual.share_of_matmul"] = ms["matmul_torch"] / ms["naive_ours"]
        out["continual.share_of_fastest_matmul"] = fastest / ms["naive_ours"]
    return out


def continual_table(metrics: dict[str, float]) -> str:
    "What `bench_continual` returns, as text."
    found = {k.removeprefix("continual."): v for k, v in metrics.items()}
    cell = lambda k: f"{found[k]:,.2f}" if k in found else "-"
    rows = [["ms a step", "ours", "avalanche", "van de Ven", "avalanche / ours", "van de Ven / ours"]]
    for m in METHODS:
        if f"{m}_ours_ms" not in found: continue
        times = [cell(f"{m}_{who}_ms") for who in ("ours", "avalanche", "vandeven")]
        rows.append([m, *times, *(cell(f"{m}_speedup_vs_{who}") for who in ("avalanche", "vandeven"))])
    bare = [["bare products", "ms", "share of our step, %"]]
    for library in ("torch", "onednn"):
        if f"matmul_{library}_ms" not in found: continue
        share = found[f"matmul_{library}_ms"] / found.get("naive_ours_ms", math.nan)
        bare.append([library, cell(f"matmul_{library}_ms"), f"{100 * share:.0f}"])
    diagonal = [
        ["Fisher information", "µs a sample"],
        ["closed form", f"{found['fisher_us']:.0f}"],
        ["loop", f"{found['fisher_loop_us']:.0f}"],
        ["loop / closed form", f"{found['fisher_speedup']:.0f}"],
    ]
    return "\n\n".join(text_table(part, numbers=True) for part in (rows, bare, diagonal))

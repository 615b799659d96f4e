"""A training that is killed with SIGKILL, at every kind of moment, ends with the same bits as one left alone.

Every attempt is a process of its own, forked from a server that has imported torch once.
"""
import hashlib
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import memory_notebook.train as mt
from memory_notebook.core import set_seed

processes = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
if os.name == "posix": processes.set_forkserver_preload(["memory_notebook.train", "torch._dynamo", "pytest"])


def die(): os.kill(os.getpid(), signal.SIGKILL)


class Noise(mt.Callback):
    "Draws from every generator, keeps a state, and may be the place where the process dies."
    def __init__(self, moment):
        self.moment = moment
        self.level = torch.zeros(())
    def before_step(self, loop): self.level = .9 * self.level + torch.randn(()) + random.random() + np.random.rand()
    def after_backward(self, loop):
        if self.moment == f"backward{loop.step}": die()
        for p in loop.model.parameters(): p.grad.add_(1e-3 * self.level)
    def after_step(self, loop):
        if self.moment == f"step{loop.step}": die()
        if self.moment == "slow": time.sleep(.02)
    def after_epoch(self, loop):
        if self.moment == f"epoch{loop.epoch}": die()
    def state_dict(self): return {"level": self.level}
    def load_state_dict(self, state): self.level = state["level"]


def die_at_save(number: int) -> None:
    "Die between the writing of the file and its renaming."
    replace = os.replace
    count = [0]
    def dying(a, b):
        count[0] += 1
        if count[0] == number: die()
        replace(a, b)
    os.replace = dying


def training(path: Path, moment: str) -> None:
    "One attempt; if it comes to its end, the digest of everything that must be equal lies beside the checkpoint."
    torch.set_num_threads(1)
    if moment.startswith("save"): die_at_save(int(moment[4:]))
    set_seed(7)
    net = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Dropout(.3), nn.Linear(24, 1))
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    x = torch.randn(90, 6)
    y = x.sum(1, keepdim=True).sin()
    noise = Noise(moment)
    history = mt.fit(
        net, mt.loader(x[:70], y[:70], batch_size=16, seed=7), val=mt.loader(x[70:], y[70:], shuffle=False),
        optimizer=opt, epochs=4, clip=1., patience=9, callbacks=[noise], checkpoint=path, every=1, device="cpu",
        progress=False,
    )
    moments = [v for s in opt.state.values() for v in s.values()]
    parts = [*net.state_dict().values(), *moments, noise.level, torch.rand(3)]
    numbers = json.dumps([history, random.random(), np.random.rand()]).encode()
    bits = b"".join(t.numpy().tobytes() for t in parts) + numbers
    path.with_suffix(".digest").write_text(hashlib.sha256(bits).hexdigest())


def attempt(path: Path, moment: str) -> multiprocessing.Process:
    process = processes.Process(target=training, args=(path, moment))
    process.start()
    return process


def finish(path: Path) -> str:
    run = attempt(path, "never")
    run.join(120)
    assert run.exitcode == 0
    return path.with_suffix(".digest").read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> str:
    return finish(tmp_path_factory.mktemp("whole") / "a.ckpt")


@pytest.mark.parametrize("moment", ["step1", "backward7", "step13", "epoch2", "save3", "save10"])
def test_killed_run_ends_with_the_same_bits(moment, undisturbed, tmp_path):
    first = attempt(tmp_path / "a.ckpt", moment)
    first.join(120)
    assert first.exitcode == -signal.SIGKILL, "the process was to die"
    assert finish(tmp_path / "a.ckpt") == undisturbed


def test_killed_from_outside_twice(undisturbed, tmp_path):
    path = tmp_path / "a.ckpt"
    for _ in range(2):
        run = attempt(path, "slow")
        before = path.stat().st_mtime_ns if path.exists() else 0
        deadline = time.time() + 60
        while not (path.exists() and path.stat().st_mtime_ns > before) and time.time() < deadline: time.sleep(.005)
        run.kill()
        run.join()
        assert run.exitcode == -signal.SIGKILL and path.exists()
    assert finish(path) == undisturbed

"""A training that is killed with SIGKILL, at every kind of moment, ends with the same bits as one that was left alone."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TRAINING = '''
import hashlib, json, os, random, signal, sys
import numpy as np, torch
from torch import nn
from memory_notebook.core import set_seed
import memory_notebook.train as mt

torch.set_num_threads(1)
path, moment = sys.argv[1], sys.argv[2]
die = lambda: os.kill(os.getpid(), signal.SIGKILL)

class Noise(mt.Callback):
    "Draws from every generator, keeps a state, and may be the place where the process dies."
    def __init__(self): self.level = torch.zeros(())
    def before_step(self, loop): self.level = .9 * self.level + torch.randn(()) + random.random() + np.random.rand()
    def after_backward(self, loop):
        if moment == f"backward{loop.step}": die()
        for p in loop.model.parameters(): p.grad.add_(1e-3 * self.level)
    def after_step(self, loop):
        if moment == f"step{loop.step}": die()
        if moment == "slow": import time; time.sleep(.02)
    def after_epoch(self, loop):
        if moment == f"epoch{loop.epoch}": die()
    def state_dict(self): return {"level": self.level}
    def load_state_dict(self, state): self.level = state["level"]

if moment.startswith("save"):  # die between the writing of the file and its renaming
    replace, count = os.replace, [0]
    def dying(a, b):
        count[0] += 1
        if count[0] == int(moment[4:]): die()
        replace(a, b)
    os.replace = dying

set_seed(7)
net = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Dropout(.3), nn.Linear(24, 1))
opt = torch.optim.Adam(net.parameters(), 1e-2)
x = torch.randn(90, 6); y = x.sum(1, keepdim=True).sin()
noise = Noise()
h = mt.fit(net, mt.loader(x[:70], y[:70], batch_size=16, seed=7), val=mt.loader(x[70:], y[70:], shuffle=False), optimizer=opt, epochs=4,
           clip=1., patience=9, callbacks=[noise], checkpoint=path, every=1, device="cpu", progress=False)
parts = [*net.state_dict().values(), *[v for s in opt.state.values() for v in s.values()], noise.level, torch.rand(3)]
bits = b"".join(t.numpy().tobytes() for t in parts) + json.dumps([h, random.random(), np.random.rand()]).encode()
print(hashlib.sha256(bits).hexdigest())
'''


def attempt(path: Path, moment: str) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(path), moment], stdout=subprocess.PIPE, text=True, env=env
    )


def finish(path: Path) -> str:
    run = attempt(path, "never")
    out, _ = run.communicate(timeout=120)
    assert run.returncode == 0
    return out.strip()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> str:
    return finish(tmp_path_factory.mktemp("whole") / "a.ckpt")


@pytest.mark.parametrize("moment", ["step1", "backward7", "step13", "epoch2", "save3", "save10"])
def test_killed_run_ends_with_the_same_bits(moment, undisturbed, tmp_path):
    first = attempt(tmp_path / "a.ckpt", moment)
    first.wait(timeout=120)
    assert first.returncode == -signal.SIGKILL, "the process was to die"
    assert finish(tmp_path / "a.ckpt") == undisturbed


def test_killed_from_outside_twice(undisturbed, tmp_path):
    path = tmp_path / "a.ckpt"
    for _ in range(2):
        run = attempt(path, "slow")
        before = path.stat().st_mtime_ns if path.exists() else 0
        deadline = time.time() + 60
        while not (path.exists() and path.stat().st_mtime_ns > before) and time.time() < deadline: time.sleep(.005)
        run.kill()
        run.wait()
        assert run.returncode == -signal.SIGKILL and path.exists()
    assert finish(path) == undisturbed

"""Two processes training together end with the weights of one process that sees both batches at once, and resume alike."""
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TRAINING = '''
import json, sys
import torch
from torch import nn
from memory_notebook.core import set_seed
from memory_notebook.train import Callback, fit, loader

torch.set_num_threads(1)
path, batch_size, stop = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
class Stop(Callback):
    def after_step(self, loop):
        if loop.step == stop: raise SystemExit(3)

set_seed(0)
net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
x = torch.randn(64, 4); y = x.sum(1, keepdim=True)
fit(net, loader(x, y, batch_size=batch_size, seed=1), optimizer=torch.optim.SGD(net.parameters(), .1), epochs=2, callbacks=[Stop()],
    device="cpu", checkpoint=path, every=1, progress=False)
'''


def train(path: Path, processes: int, stop: int = -1) -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = []
    for rank in range(processes):
        env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        if processes > 1:
            env |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        ranks.append(
            subprocess.Popen([sys.executable, "-c", TRAINING, str(path), str(16 // processes), str(stop)], env=env)
        )
    return max(r.wait(timeout=180) for r in ranks)


def weights(path: Path) -> list[torch.Tensor]:
    from memory_notebook.train import load_checkpoint
    return list(load_checkpoint(path)["model"].values())


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo backend here")
def test_two_processes_equal_one_and_resume(tmp_path):
    assert train(tmp_path / "one", 1) == 0
    assert train(tmp_path / "two", 2) == 0
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"))
    assert train(tmp_path / "stopped", 2, stop=6) == 3
    assert train(tmp_path / "stopped", 2) == 0
    torch.testing.assert_close(weights(tmp_path / "stopped"), weights(tmp_path / "two"), rtol=0, atol=0)

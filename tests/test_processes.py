"""Two processes that train together end with the weights of one that sees both batches at once, and resume alike."""
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
from torch import nn

from memory_notebook.core import set_seed
from memory_notebook.train import Callback, fit, load_checkpoint, loader

processes = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
if os.name == "posix": processes.set_forkserver_preload(["memory_notebook.train", "torch._dynamo", "pytest"])


class Stop(Callback):
    def __init__(self, step): self.step = step
    def after_step(self, loop):
        if loop.step == self.step: raise SystemExit(3)


def training(path: Path, batch_size: int, stop: int, environment: dict[str, str]) -> None:
    "What each process does."
    os.environ.update(environment)
    torch.set_num_threads(1)
    set_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(64, 4)
    y = x.sum(1, keepdim=True)
    fit(
        net, loader(x, y, batch_size=batch_size, seed=1), optimizer=torch.optim.SGD(net.parameters(), .1), epochs=2,
        callbacks=[Stop(stop)], device="cpu", checkpoint=path, every=1, progress=False,
    )


def train(path: Path, count: int, stop: int = -1) -> int:
    "Train in so many processes; the highest exit code."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = []
    for rank in range(count):
        environment = {"ACCELERATE_USE_CPU": "true"}
        if count > 1:
            environment |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }
        ranks.append(processes.Process(target=training, args=(path, 16 // count, stop, environment)))
    for rank in ranks: rank.start()
    for rank in ranks: rank.join(180)
    return max(rank.exitcode for rank in ranks)


def weights(path: Path) -> list[torch.Tensor]: return list(load_checkpoint(path)["model"].values())


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo backend here")
def test_two_processes_equal_one_and_resume(tmp_path):
    assert train(tmp_path / "one", 1) == 0
    assert train(tmp_path / "two", 2) == 0
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"))
    assert train(tmp_path / "stopped", 2, stop=6) == 3
    assert train(tmp_path / "stopped", 2) == 0
    torch.testing.assert_close(weights(tmp_path / "stopped"), weights(tmp_path / "two"), rtol=0, atol=0)
    with pytest.raises(ValueError, match="processes 2, now 1"): training(tmp_path / "stopped", 16, -1, {})

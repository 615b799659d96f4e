"""`fit` with data, callbacks and checkpoints that a notebook cannot show: streams, workers, trainings inside trainings,
a checkpoint that belongs to another training, and a progress bar in a kernel."""
import random
import subprocess
import sys
import warnings
from collections import namedtuple
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from memory_notebook.core import set_seed
from memory_notebook.train import (
    Callback,
    EarlyStop,
    evaluate,
    fit,
    load_checkpoint,
    loader,
    progress_bar,
    save_checkpoint,
)

set_seed(0)
X = torch.randn(48, 4)
Y = X.sum(1, keepdim=True)


class Killed(Exception): ...


class KillAt(Callback):
    def __init__(self, step): self.at = step
    def after_step(self, loop):
        if loop.step == self.at: raise Killed


def train(data=None, *, kill=None, seed=3, norm=False, opt=torch.optim.Adam, lr=1e-2, **options):
    "A small training: its weights, and what it returned."
    set_seed(seed)
    net = nn.Sequential(nn.Linear(4, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.Dropout(.2), nn.Linear(8, 1))
    batches = loader(X, Y, batch_size=8, seed=seed) if data is None else data() if callable(data) else data
    options = dict(epochs=2, device="cpu", callbacks=[KillAt(kill)]) | options
    history = fit(net, batches, optimizer=opt(net.parameters(), lr), **options)
    return net.state_dict(), history


def same_bits(a, b):
    torch.testing.assert_close(a[0], b[0], rtol=0, atol=0)
    assert a[1] == b[1]


def killed_and_resumed(path, at, *args, **options):
    with pytest.raises(Killed): train(*args, kill=at, checkpoint=path, every=1, **options)
    return train(*args, checkpoint=path, every=1, **options)


# ---------------------------------------------------------------- data


class Stream(IterableDataset):
    "Rows that are drawn as they come; it has no length."
    def __iter__(self):
        for i in range(20): yield X[i] + .1 * torch.randn(4), Y[i]


def test_an_iterable_dataset(tmp_path):
    data = lambda: DataLoader(Stream(), batch_size=4)
    assert len(train(data)[1]["train_loss"]) == 2
    same_bits(killed_and_resumed(tmp_path / "a", 7, data), train(data))


def named_step(model, batch, loss_fn):
    output = model(batch["x"])
    return loss_fn(output, batch["labels"]), output


def test_batches_that_are_dicts(tmp_path):
    "As Hugging Face's collators make them; the last batch is smaller and weighs less."
    rows = [{"x": X[i:i + 10], "labels": Y[i:i + 10]} for i in range(0, 48, 10)]
    pairs = [(r["x"], r["labels"]) for r in rows]
    error = {"error": lambda output, target: (output - target).abs().mean()}
    same_bits(train(rows, step=named_step, val=rows, metrics=error), train(pairs, val=pairs, metrics=error))
    same_bits(killed_and_resumed(tmp_path / "a", 7, rows, step=named_step), train(rows, step=named_step))
    with pytest.raises(TypeError, match="got a dict: pass step="): train(rows)
    other = [{"x": r["x"], "y": r["labels"]} for r in rows]
    step = lambda model, batch, loss_fn: (loss_fn(model(batch["x"]), batch["y"]), model(batch["x"]))
    with pytest.raises(TypeError, match="a dict with `labels`"): evaluate(
        nn.Linear(4, 1), other, nn.functional.mse_loss, error, step=step)


def test_a_batch_that_is_one_tensor():
    "Its samples are its rows, not the elements of its last row."
    step = lambda model, batch, loss_fn: (loss_fn(model(batch), batch), model(batch))
    parts = [X[:32], X[32:]]
    net = nn.Linear(4, 4)
    torch.testing.assert_close(
        evaluate(net, parts, nn.functional.mse_loss, step=step)["loss"], nn.functional.mse_loss(net(X), X).item()
    )


class Augmented(Dataset):
    "Noise drawn in the workers, from Python's generator and from torch's."
    def __len__(self): return 16
    def __getitem__(self, i): return X[i] + .1 * torch.randn(4) + random.random(), Y[i]


@pytest.mark.parametrize("at", [3, 6])
def test_persistent_workers_are_bit_equal(at, tmp_path):
    data = lambda: DataLoader(Augmented(), batch_size=4, shuffle=True, num_workers=1, persistent_workers=True)
    with pytest.warns(UserWarning, match="persistent_workers is set aside"): whole = train(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same_bits(killed_and_resumed(tmp_path / "a", at, data, val=None), whole)


def test_batch_norm_resumes(tmp_path):
    same_bits(killed_and_resumed(tmp_path / "a", 7, norm=True), train(norm=True))


# ---------------------------------------------------------------- callbacks


def test_fit_inside_a_callback(tmp_path):
    class Inner(Callback):
        def after_epoch(self, loop):
            random_state = torch.get_rng_state()
            train(seed=9, precision="bf16")
            torch.set_rng_state(random_state)
    plain = [train(callbacks=[Callback()], val=[(X, Y)], clip=1.)]
    same_bits(train(callbacks=[Inner()], val=[(X, Y)], clip=1., checkpoint=tmp_path / "a"), plain[0])


def test_an_accelerator_around_it_survives():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(reset_partial_state=True)  # of tests that came before
    theirs = Accelerator(cpu=True, mixed_precision="bf16")
    train()
    assert theirs.mixed_precision == "bf16" and theirs.device.type == "cpu"


class Bumpy(Callback):
    "The validation loss falls, rises and falls again."
    def after_epoch(self, loop): loop.history["val_loss"][-1] = [5., 3., 2., 4., 4.5, 1., 6., 7.][loop.epoch - 1]


def test_five_epochs_and_three_more_are_eight(tmp_path):
    options = dict(val=[(X, Y)], patience=4, callbacks=[Bumpy()])
    first = train(epochs=5, checkpoint=tmp_path / "a", **options)
    same_bits(train(epochs=3, **options), (first[0], {k: v[:3] for k, v in first[1].items()}))  # its best epoch
    same_bits(train(epochs=8, checkpoint=tmp_path / "a", **options), train(epochs=8, **options))
    same_bits(train(epochs=8, checkpoint=tmp_path / "a", **options), train(epochs=6, **options)[:1] + (
        train(epochs=8, **options)[1],))  # finished: the best weights once more


def test_early_stop_does_not_undo_the_stop_of_another_callback():
    class Stop(Callback):
        def after_epoch(self, loop): loop.stop = True
    history = train(epochs=4, val=[(X, Y)], callbacks=[Stop(), EarlyStop(9)])[1]
    assert len(history["train_loss"]) == 1


# ---------------------------------------------------------------- another training


@pytest.mark.parametrize("changed, says", [
    (dict(data=lambda: loader(X, Y, batch_size=24, seed=3)), "batches an epoch 6, now 2"),
    (dict(data=lambda: DataLoader(Stream(), batch_size=4)), "batches an epoch 6, now None"),
    (dict(opt=torch.optim.SGD), "optimizer Adam, now SGD"),
    (dict(lr=1e-3), "lr 0.01, now 0.001"),
    (dict(clip=1.), "clip None, now 1.0"),
    (dict(precision="bf16"), "precision no, now bf16"),
    (dict(norm=True), "is of another training"),
    (dict(patience=2, val=[(X, Y)]), "callbacks ['KillAt'], now ['KillAt', 'EarlyStop']"),
    (dict(epochs=1), "epochs 2, now 1"),
], ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_a_checkpoint_of_another_training_is_refused(changed, says, tmp_path):
    train(checkpoint=tmp_path / "a")
    with pytest.raises(ValueError) as e: train(checkpoint=tmp_path / "a", **changed)
    assert says in str(e.value) and "\n" not in str(e.value) and "resume=False" in str(e.value)
    assert "delete" not in str(e.value)
    train(checkpoint=tmp_path / "a", resume=False, **changed)


def test_in_the_middle_of_an_epoch_too(tmp_path):
    with pytest.raises(Killed): train(kill=4, checkpoint=tmp_path / "a", every=1)
    with pytest.raises(ValueError, match="batches an epoch 6, now 2"):
        train(lambda: loader(X, Y, batch_size=24, seed=3), checkpoint=tmp_path / "a")


# ---------------------------------------------------------------- what a checkpoint holds


class State(NamedTuple):
    memory: torch.Tensor
    usage: tuple


def test_a_state_comes_back(tmp_path):
    local = namedtuple("local", "a b")  # as in a function of the user: no module knows it
    state = {"state": State(torch.ones(2), (1, None)), ("layer", 3): torch.Size([2, 3]), "local": local([1], "x")}
    save_checkpoint(tmp_path / "a", state)
    back = load_checkpoint(tmp_path / "a")
    assert type(back["state"]) is State and torch.equal(back["state"].memory, torch.ones(2))
    assert back["state"].usage == (1, None)
    assert type(back["layer", 3]) is torch.Size and back["layer", 3] == (2, 3)
    assert (back["local"].a, back["local"].b) == ([1], "x")


@pytest.mark.parametrize("part", [
    {1, 2}, torch.ones(3).to_sparse(), torch.empty(2, device="meta"), torch.float32, {frozenset(): 1}, {(1, len): 1},
    torch.ones(2).max(0),
], ids=str)
def test_what_could_not_be_loaded_is_not_saved(part, tmp_path):
    save_checkpoint(tmp_path / "a", {"whole": 1})
    with pytest.raises(TypeError, match="cannot hold"): save_checkpoint(tmp_path / "a", {"part": [part]})
    assert load_checkpoint(tmp_path / "a") == {"whole": 1}


def test_a_whole_file_is_never_to_be_deleted(tmp_path):
    from safetensors.torch import save_file
    save_file({"w": torch.ones(1)}, tmp_path / "b")
    save_file({"w": torch.ones(1)}, tmp_path / "c", metadata={"state": '{"set": [1]}'})
    for name in "bc":
        with pytest.raises(ValueError) as e: load_checkpoint(tmp_path / name)
        assert "delete" not in str(e.value) and "damaged" not in str(e.value)


# ---------------------------------------------------------------- progress


BAR = """
import torch
from torch import nn
from memory_notebook.train import fit, loader
net = nn.Linear(4, 1)
x = torch.randn(64, 4)
fit(net, loader(x, x[:, :1], batch_size=2), optimizer=torch.optim.SGD(net.parameters(), .1), device="cpu")
"""


def test_a_bar_in_a_kernel_and_none_in_a_pipe(monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    shown = []
    for disable in (False, True):
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(BAR)])
        if disable: monkeypatch.setenv("TQDM_DISABLE", "1")
        client.NotebookClient(nb, timeout=120, kernel_name="python3").execute()
        shown.append(str([o for o in nb.cells[0].outputs if "data" in o or o.get("name") == "stderr"]))
    assert "training" in shown[0] or "widget-view" in shown[0], shown[0]
    assert "training" not in shown[1] and "widget-view" not in shown[1]
    assert progress_bar(3).disable  # pytest is no terminal
    done = subprocess.run([sys.executable, "-c", BAR], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

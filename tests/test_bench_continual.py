"""The benchmark of continual learning: the times it takes, the ratios it makes, and how it talks to its peers."""
import sys
from pathlib import Path

import pytest

from memory_notebook.bench.continual import Peer, continual_metrics, continual_table, write_mnist
from memory_notebook.data import load_digits
from memory_notebook.runs import run_experiment


def echo_steps(tick, text):  # a peer that does nothing but count
    print(text)
    while True: tick()


def lost_steps(tick): __import__("not_there")


def test_bench_on_digits():
    said = []
    metrics = run_experiment(
        "benchmark:continual", out=None, log=said.append, data="digits", methods=("naive",), rounds=2, steps=2
    )["metrics"]
    assert 0 < metrics["continual.share_of_fastest_matmul"] < 1.5 and metrics["continual.fisher_speedup"] > 3
    assert any("van de Ven" in s for s in said)
    assert any("avalanche is not timed" in s for s in said) or "continual.naive_speedup_vs_avalanche" in metrics
    assert "bare products" in continual_table(metrics)


def test_options_are_checked_before_data_are_fetched(monkeypatch):
    def fetch(): raise AssertionError("data were fetched")
    monkeypatch.setattr("memory_notebook.bench.continual.load_mnist", fetch)
    for options, message in (({"methods": ("ewk",)}, "no method is called 'ewk'"), ({"steps": 0}, "at least 1")):
        with pytest.raises(ValueError, match=message): run_experiment("benchmark:continual", out=None, **options)


def test_ratios():
    made = continual_metrics(
        {
            "naive_ours": 2.0,
            "naive_avalanche": 8.0,
            "er_ours": 4.0,
            "er_vandeven": 10.0,
            "matmul_torch": 3.0,
            "matmul_onednn": 1.0,
        },
        (1e-4, 1e-2),
    )
    assert made["continual.naive_speedup_vs_avalanche"] == 4.0
    assert made["continual.er_speedup_vs_vandeven"] == 2.5
    assert made["continual.share_of_matmul"] == 1.5
    assert made["continual.share_of_fastest_matmul"] == 0.5
    assert round(made["continual.fisher_speedup"]) == 100
    table = continual_table(made)
    assert "2.00" in table and "150" in table and "ewc" not in table


def test_peer_takes_steps_when_asked():
    with Peer(sys.executable, 3, echo_steps, "noise") as peer:
        peer.ready()
        assert 0 <= peer() < 1 and 0 <= peer() < 1


def test_peer_that_cannot_start_says_why():
    with Peer(sys.executable, 3, lost_steps) as peer:
        with pytest.raises(RuntimeError, match="No module named 'not_there'"): peer.ready()


def test_images_as_mnist_files(tmp_path):
    out = write_mnist(load_digits(), tmp_path)
    raw = (Path(tmp_path) / "MNIST/MNIST/raw/t10k-images-idx3-ubyte").read_bytes()
    assert (len(raw) - 16, out[2].shape[1], raw[:4]) == (784 * len(out[2]), 784, b"\x00\x00\x08\x03")

"""A table of values that is spread over processes gives what one table gives, whatever tokens the processes have."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = '''
import sys
import torch
import torch.distributed as dist
from torch.testing import assert_close
from memory_notebook.core import set_seed
from memory_notebook.sparse.scale import ShardedValuePool, load_values, save_values, shard_values
from memory_notebook.sparse.sparse import ProductKeyConfig, ProductKeyMemory, ValuePool

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
world = dist.get_world_size()
folder = sys.argv[1]

set_seed(0)
whole = ValuePool(50, 6).double()
table = whole.weight
slots = torch.randint(0, 50, (11, 4))
weights = torch.rand(11, 4).double()
probe = torch.randn(11, 6).double()
cut = [0, 3, 11] if world == 2 else [0, 5, 5, 11]  # unequal shares, one of them empty
for tokens in ("split", "same"):
    part = slice(cut[rank], cut[rank + 1]) if tokens == "split" else slice(None)
    for gradient in ("dense", "sparse"):
        pool = ShardedValuePool(50, 6, gradient, tokens=tokens, dtype=torch.float64)
        here = slice(pool.start, pool.start + len(pool.weight))
        pool.weight.data.copy_(table.data[here])
        w = weights.clone().requires_grad_()
        own = weights[part].clone().requires_grad_()
        table.grad = None
        (whole(slots, w) * probe).sum().backward()
        out = pool(slots[part], own)
        (out * probe[part]).sum().backward()
        assert_close(out, whole(slots, w)[part])
        assert_close(own.grad, w.grad[part])
        mean = world if tokens == "split" else 1
        assert_close(pool.weight.grad.to_dense(), table.grad[here] / mean)
        assert pool.weight.grad.is_sparse == (gradient == "sparse")

set_seed(1)
layer = ProductKeyMemory(ProductKeyConfig(8, memory_slots=49, heads=2, k=3, key_dim=8))
x = torch.randn(5, 8)
want = layer(x)
assert_close(shard_values(layer, tokens="same")(x), want)
assert layer._ddp_params_and_buffers_to_ignore == ["values.weight", "values.documents", "values.document_count"]
if world == 2: save_values(layer.values, folder)
else: load_values(layer.values, folder)
assert_close(layer(x), want)
dist.destroy_process_group()
'''

TEACH = """
import warnings
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from memory_notebook.core import set_seed
from memory_notebook.sparse.engram import add_engram
from memory_notebook.sparse.finetuning import RULES, SparseFinetuner, add_memory_layers, count_background
from memory_notebook.sparse.host import tiny_model
from memory_notebook.sparse.scale import shard_values
from memory_notebook.sparse.sparse import ProductKeyConfig, ProductKeyMemory

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
sizes = {"memory_slots": 64, "heads": 2, "k": 3, "key_dim": 8}
make = lambda: add_memory_layers(tiny_model("llama"), (0, 2), **sizes)
set_seed(1)
ids = torch.randint(2, 60, (4, 6))
background = [torch.randint(2, 60, (4, 6)) for _ in range(5)]
half = slice(2 * rank, 2 * rank + 2)

alone = make()  # one process that sees both halves
count_background(alone, background)
for rule in RULES:
    with SparseFinetuner(alone, t=5, rule=rule) as finetuner:
        alone.zero_grad()
        alone(ids, labels=ids).loss.backward()
        want = alone.memory_values.weight.grad.to_dense()
        rows = finetuner.chosen
    for counted_first in (True, False):
        model = make()
        if counted_first: count_background(model, background)
        shard_values(model)
        pool = model.memory_values
        if not counted_first: count_background(model, [b[half] for b in background])
        assert_close(pool.documents, alone.memory_values.documents)
        with SparseFinetuner(model, t=5, rule=rule) as finetuner:
            model(ids[half], labels=ids[half]).loss.backward()
            assert_close(finetuner.chosen.sort().values, rows.sort().values)
            assert_close(pool.weight.grad.to_dense(), want[pool.start:pool.start + len(pool.weight)])

config = ProductKeyConfig(8, memory_slots=49, heads=2, k=3, key_dim=8)
x = torch.randn(4, 8)
for gradient in ("sparse", "auto"):  # averaged as a dense gradient, and said
    set_seed(2)
    layer = ProductKeyMemory(config.__class__(**vars(config) | {"gradient": gradient}))
    layer(x).square().mean().backward()
    want = layer.values.weight.grad.to_dense()
    layer.zero_grad()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        spread = DistributedDataParallel(layer)
        spread(x[half]).square().mean().backward()
    assert_close(layer.values.weight.grad, want)
    assert any("under DistributedDataParallel" in str(w.message) for w in said)
model = make()
count_background(model, background)
with SparseFinetuner(model, t=5):
    try: DistributedDataParallel(model)(ids[half])
    except ValueError as error: assert "call shard_values first" in str(error)
    else: raise AssertionError("rows that were not chosen would be averaged")
model = add_engram(tiny_model("llama"), (0,), rows=101, read_dim=24, heads=3, sparse=True)
spread = DistributedDataParallel(model)
spread(ids[half], labels=ids[half]).loss.backward()
assert model.model.layers[0].engram.table.weight.grad.is_sparse
del spread  # the wrapper holds the group, which must end first
dist.destroy_process_group()
"""


def launch(folder: Path, processes: int, program: str = PROGRAM) -> None:
    file = folder / "program.py"
    file.write_text(program)
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*starter, str(file), str(folder / "values")]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo backend here")
def test_sharded_equals_whole_and_is_read_by_another_number_of_processes(tmp_path):
    launch(tmp_path, 2)
    launch(tmp_path, 3)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo backend here")
def test_sharded_values_are_taught_as_whole_ones_and_sparse_gradients_are_averaged(tmp_path):
    launch(tmp_path, 2, TEACH)

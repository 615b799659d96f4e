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


def launch(folder: Path, processes: int) -> None:
    file = folder / "program.py"
    file.write_text(PROGRAM)
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

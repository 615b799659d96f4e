"""Every public module of the package under the features of torch: what holds, what falls back, what refuses."""

import inspect
import pkgutil
import tempfile
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import memory_notebook
from memory_notebook.features import CHECKS, Inputs, gradients, torch_features
from memory_notebook.runs import Run, benchmark, chosen, text_table

PROCESSES = "two processes"


class Case(NamedTuple):
    "A module of the book, small, and arguments for it."
    build: Callable[[], nn.Module]
    inputs: Inputs
    on: Callable[[], nn.Module] | None = None  # builds what it is built on, a module with the same inputs

    def make(self) -> nn.Module:
        "The module, always with the same weights."
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.build()

    def features(self, checks: list[str]) -> dict[str, str]:
        "What it supports."
        return torch_features(self.make, self.inputs, checks, self.on and (self.on, self.inputs))


def _randn(*shape: int) -> Tensor: return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _randint(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(1))


def _vectors(b: int) -> tuple: return (_randn(b, 6),)


def _sequences(b: int) -> tuple: return (_randn(b, 4, 6),)


def _tokens(b: int) -> tuple: return (_randint(50, b, 6),)


class _Reader(nn.Module):
    "An episodic memory that was written to, as a function of the key."
    def __init__(self):
        super().__init__()
        from memory_notebook.agent.episodic import EpisodicMemory, EpisodicMemoryConfig
        self.memory = EpisodicMemory(EpisodicMemoryConfig(memory_slots=8, slot_dim=6))
        self.memory.write(torch.eye(6), torch.randn(6, 6))

    def forward(self, keys: Tensor) -> Tensor: return self.memory.read(keys.unsqueeze(1), 5.0)


class _Controller(nn.Module):
    "A controller that reads a lasting memory."
    def __init__(self):
        super().__init__()
        from memory_notebook.agent.controller import MemoryController
        self.memory = _Reader().memory
        self.controller = MemoryController(6, 8, self.memory.config)

    def forward(self, x: Tensor) -> Tensor: return self.controller(x, self.memory, write=False)[0]


def _rare_events() -> nn.Module:
    from memory_notebook.agent.oneshot import RareEventMemory
    memory = RareEventMemory(6, memory_slots=16, neighbours=4)
    memory(torch.randn(8, 6), torch.arange(8))
    return memory


def _gpt2() -> nn.Module:
    from memory_notebook.sparse.host import small_gpt2
    return small_gpt2(50, width=16, layers=2, heads=2, context=16, use_cache=False, attn_implementation="eager")


def _memory_gpt2() -> nn.Module:
    from memory_notebook.sparse.finetuning import add_memory_layers
    return add_memory_layers(_gpt2(), (1,), memory_slots=64, heads=2, k=4, key_dim=8)


def _engram_gpt2() -> nn.Module:
    from memory_notebook.sparse.engram import add_engram
    return add_engram(_gpt2(), (1,), rows=100, heads=2, read_dim=16)


class _Given(nn.Module):
    "A module some of whose arguments stay the same."
    def __init__(self, module: nn.Module, *more: Tensor):
        super().__init__()
        self.module = module
        self.more = len(more)
        for i, value in enumerate(more): self.register_buffer(f"given{i}", value)

    def forward(self, x: Tensor): return self.module(x, *(self.get_buffer(f"given{i}") for i in range(self.more)))


def _proto_net() -> nn.Module:
    from memory_notebook.agent.oneshot import ProtoNet
    return ProtoNet(nn.Sequential(nn.Flatten(), nn.Linear(36, 5)))


def _episodes(b: int) -> tuple:
    return _randn(b, 4, 6, 6), torch.tensor([0, 0, 1, 1]).repeat(b, 1), _randn(b, 2, 6, 6), 2


def _slda() -> nn.Module:
    from memory_notebook.continual.families import SLDA
    model = SLDA(6, contexts=2, classes=2, dtype=torch.float32)
    model.learn(torch.randn(40, 6), torch.arange(40) % 2, torch.arange(40) // 2 % 2)
    return model


class _Reconstruct(nn.Module):
    "A VAE from picture to mean code to picture; its own forward pass is a loss with noise in it."
    def __init__(self):
        super().__init__()
        from memory_notebook.continual.families import VAE
        self.vae = VAE(6, (8,), 3)

    def forward(self, x: Tensor) -> Tensor: return self.vae.decoder(self.vae.encode(x)[0])


def _named(module: str, name: str, *args, **options) -> Callable[[], nn.Module]:
    "Builds a class of the package when it is called."
    return lambda: getattr(import_module(module, "memory_notebook"), name)(*args, **options)


def _cell(module: str, kind: str, *args, **options) -> Callable[[], nn.Module]:
    "Builds a cell from its configuration."
    here = lambda: import_module(module, "memory_notebook")
    return lambda: getattr(here(), f"{kind}Cell")(getattr(here(), f"{kind}Config")(*args, **options))


def _layer(module: str, kind: str, config: str, *args, **options) -> Callable[[], nn.Module]:
    "Builds a module from a configuration and nothing else."
    here = lambda: import_module(module, "memory_notebook")
    return lambda: getattr(here(), kind)(getattr(here(), config)(*args, **options))


def _lstm() -> nn.Module: return nn.LSTM(6, 8, batch_first=True)


def _engram() -> nn.Module:
    from memory_notebook.sparse.engram import Engram, EngramConfig
    return Engram(EngramConfig(16, rows=100, heads=2, read_dim=16), torch.arange(50))


def _simple_memory_attention() -> nn.Module:
    from memory_notebook.language.reads import SimpleMemoryAttention
    return _Given(SimpleMemoryAttention(6), torch.randn(5, 6), torch.rand(5))


def _meta_learner() -> nn.Module:
    from memory_notebook.agent.meta import MetaLearner
    return MetaLearner(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)))


def _pool_reads(b: int) -> tuple: return _randint(64, b, 4), _randn(b, 4)


def _with_context(b: int) -> tuple: return _randn(b, 6), _randint(2, b)


_MACHINE = dict(hidden_size=8, memory_slots=6, slot_dim=4)
CASES: dict[str, Case] = {
    "EpisodicMemory": Case(_Reader, _vectors),
    "MemoryController": Case(_Controller, _sequences, _lstm),
    "MetaLearner": Case(_meta_learner, _vectors),
    "MANN": Case(_named(".agent.oneshot", "MANN", 6, **_MACHINE), _sequences),
    "MANNCell": Case(_cell(".agent.oneshot", "MANN", 6, **_MACHINE), _vectors),
    "LSTMClassifier": Case(_named(".agent.oneshot", "LSTMClassifier", 6, 2, 8), _sequences, _lstm),
    "RareEventMemory": Case(_rare_events, lambda b: (_randn(b, 6), None, False)),
    "ProtoNet": Case(_proto_net, _episodes),
    "ContinualLearningModel": Case(
        _named(".continual.continual", "ContinualLearningModel", 6, 8, 8, 4, 2, 3), _with_context
    ),
    "VAE": Case(_Reconstruct, lambda b: (_randn(b, 6).sigmoid(),)),
    "XdG": Case(_named(".continual.families", "XdG", 6, 2, 2, (8,), 0.5), _with_context),
    "SeparateNetworks": Case(_named(".continual.families", "SeparateNetworks", 6, 2, 2, (8,)), _with_context),
    "SLDA": Case(_slda, _vectors),
    "MLP": Case(_named(".learner", "MLP", 6, 2, (8,)), _vectors),
    "LSTM": Case(_named(".practice", "LSTM", 6, 8), _sequences, _lstm),
    "NTM": Case(_named(".machines.ntm", "NTM", 6, **_MACHINE), _sequences),
    "NTMCell": Case(_cell(".machines.ntm", "NTM", 6, **_MACHINE), _vectors),
    "DNC": Case(_named(".machines.dnc", "DNC", 6, **_MACHINE), _sequences),
    "DNCCell": Case(_cell(".machines.dnc", "DNC", 6, **_MACHINE), _vectors),
    "ValuePool": Case(_named(".sparse.sparse", "ValuePool", 64, 6), _pool_reads),
    "ProductKeys": Case(_named(".sparse.sparse", "ProductKeys", 6, 8, 2, 4, 8), _vectors),
    "ProductKeyMemory": Case(
        _layer(".sparse.sparse", "ProductKeyMemory", "ProductKeyConfig", 6, 64, 2, 4, 8), _sequences
    ),
    "Engram": Case(_engram, lambda b: (_randn(b, 6, 16), *_tokens(b))),
    "SimpleMemoryAttention": Case(_simple_memory_attention, _sequences),
    "DeltaMemory": Case(_named(".speeds.delta", "DeltaMemory", 6, 2), _sequences),
    "ReasoningNetwork": Case(
        _named(".reasoning.reasoning", "ReasoningNetwork", 6, 3, 2), lambda b: (_randn(b, 4, 6), _randn(b, 6))
    ),
    "TemporalMemoryModel": Case(_named(".reasoning.temporal", "TemporalMemoryModel", 6, 3, 8, "gru"), _sequences, _lstm),
    "CausalAttention": Case(_named(".reasoning.temporal", "CausalAttention", 8, 2), lambda b: (_randn(b, 4, 8),)),
    "GPT-2 with memory layers": Case(_memory_gpt2, _tokens, _gpt2),
    "GPT-2 with Engram": Case(_engram_gpt2, _tokens, _gpt2),
}
# Exported modules that stand for others, and what is tried in their place.
WITHIN = {
    "MachineCell": "the base of NTMCell, DNCCell and MANNCell",
    "Machine": "the base of NTM, DNC and MANN",
    "NeuralTuringMachine": "another name of NTM",
    "DifferentiableNeuralComputer": "another name of DNC",
    "NgramHash": "inside Engram; its output is integers",
    "ShardedValuePool": "a ValuePool over processes, compared with one in tests/test_scale.py",
    "SeenClasses": "masks scores; it has no parameters",
    "GenerativeClassifier": "a VAE for each class",
    "ContinualLearningGPT2": "a GPT-2 with a bank, in tests/test_gpt2.py",
    "ContinualLearningLlama": "a Llama with a bank, in tests/test_gpt2.py",
    "Linear": "inside MLP",
    "KnowledgeGraphModel": "tables of embeddings, trained by its own `learn`",
    "TripleIndex": "an index of integers",
    "ChainReader": "an LSTM or a Transformer of torch, the baselines of the chapter",
    "CompositionMemory": "a table of counts, without gradients",
    "StoryNetwork": "a ReasoningNetwork that reads stories",
    "EntailmentNetwork": "a ReasoningNetwork that reads formulas",
    "FormulaEncoder": "inside EntailmentNetwork",
    "StackedLinear": "the layers of machines that stand side by side",
}


def exported_modules() -> list[str]:
    "Names of all nn.Modules that the package exports."
    names = set()
    for found in pkgutil.walk_packages(memory_notebook.__path__, "memory_notebook."):
        if ".bench" in found.name or found.name.endswith(("experiments", "_modidx", "__main__")): continue
        module = import_module(found.name)
        for name in getattr(module, "__all__", []):
            value = getattr(module, name)
            if inspect.isclass(value) and issubclass(value, nn.Module): names.add(name)
    return sorted(names)


def _half(rank: int, names: list[str], folder: str) -> None:
    "One of two processes: the gradients of its half of a batch, averaged with the other's, against the whole batch."
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    outcomes = {}
    for name in names:
        module = CASES[name].make()
        if not any(p.requires_grad for p in module.parameters()):
            outcomes[name] = "does not apply"
            continue
        args = CASES[name].inputs(4)
        whole = gradients(module, args)
        half = tuple(a[2 * rank : 2 * rank + 2] if isinstance(a, Tensor) else a for a in args)
        try:
            wrapped = nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)
            parts = gradients(module, half, wrapped)  # averaged over the processes
            torch.testing.assert_close([2 * g for g in parts], whole, rtol=1e-3, atol=1e-4)
            outcomes[name] = "holds"
        except AssertionError as error: outcomes[name] = f"wrong: {error}".splitlines()[0]
        except Exception as error: outcomes[name] = f"fails: {type(error).__name__}: {error}".splitlines()[0]
        del wrapped
    torch.save(outcomes, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def two_processes(names: list[str]) -> dict[str, str]:
    "Whether gradients of two processes that share a batch equal those of one."
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_half, (names, folder), nprocs=2)
        one, other = (torch.load(Path(folder) / f"{rank}.pt") for rank in range(2))
    return {name: one[name] if one[name] != "holds" else other[name] for name in names}


@benchmark("torch-features", help="what each module supports: bfloat16, compile, export, vmap, LoRA and more")
def bench_torch_features(run: Run, *,
    module: tuple[str, ...] = ("all",),  # by name
    feature: tuple[str, ...] = ("all",),
) -> dict:
    "`<module>.<feature>`: holds, falls back, refuses, does not apply, fails or wrong."
    names = chosen(module, CASES, "module")
    features = chosen(feature, [*CHECKS, PROCESSES], "feature")
    shared = two_processes(names) if PROCESSES in features else {}
    checks = [name for name in features if name in CHECKS]
    table = {}
    for name in names:
        outcomes = run.unit(name, partial(CASES[name].features, checks))
        if shared: outcomes[PROCESSES] = shared[name]
        table |= {f"{name}.{what}": outcome for what, outcome in outcomes.items()}
    return table


def features_table(metrics: dict[str, str]) -> str:
    "Module, feature and outcome of all that does more, or less, than hold."
    odd = [[*name.rsplit(".", 1), outcome] for name, outcome in metrics.items() if outcome != "holds"]
    held = len(metrics) - len(odd)
    return text_table([["module", "feature", "outcome"], *odd]) + f"\n\n{held} of {len(metrics)} hold"

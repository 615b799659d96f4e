"""A wrong argument at a public entry point is answered in one line that says what to do, or understood."""
import pytest
import torch
from torch import nn

import memory_notebook as m
from memory_notebook.runs import chosen

NET = nn.Linear(4, 2)
BATCHES = [(torch.ones(3, 4), torch.zeros(3, 2))]
ADAM = torch.optim.Adam(NET.parameters())


def refused(call) -> str:
    with pytest.raises((TypeError, ValueError)) as e: call()
    assert "\n" not in str(e.value)
    return str(e.value)


def test_methods_by_name_in_any_case_and_by_class():
    known = ["ewc", "si", "icarl"]
    assert chosen("ewc", known, "method") == chosen("EWC", known, "method") == chosen(m.EWC, known, "method") == ["ewc"]
    assert chosen([m.ICaRL, "SI"], known, "method") == ["icarl", "si"]
    assert "did you mean 'ewc'?" in refused(lambda: chosen("EWCC", known, "method"))
    assert "no method is called" in refused(lambda: chosen(m.EWC(), known, "method"))  # its settings would be lost


@pytest.mark.parametrize("call, says", [
    (lambda: m.fit(NET, BATCHES, optimizer="adam"), "torch.optim.Adam(model.parameters())"),
    (lambda: m.fit(nn.Linear(4, 2), BATCHES, optimizer=ADAM), "holds no parameter of this network"),
    (lambda: m.fit(NET, BATCHES, optimizer=ADAM, loss_fn="mse"), "loss_fn is 'mse'"),
    (lambda: m.fit(NET, BATCHES, optimizer=ADAM, patience=3), "patience needs val="),
    (lambda: m.fit(NET, torch.ones(3, 4), optimizer=ADAM), "(*inputs, target)"),
    (lambda: m.MemoryTrainer(NET, "adam").train(BATCHES), "torch.optim.Adam(model.parameters())"),
    (lambda: m.ReplayBuffer(9, "prioritysed"), "expected one of prioritised"),
    (lambda: m.Learner(NET, methods="ewc"), "as [EWC(lam=1e3)], got 'ewc'"),
    (lambda: m.Learner(NET, methods=m.EWC), "as [EWC(lam=1e3)], got <class"),
    (lambda: m.Learner(NET, methods=[m.EWC]), "as [EWC(lam=1e3)], got <class"),
    (lambda: m.Learner(NET, opt="adam"), "torch.optim.Adam(model.parameters())"),
    (lambda: m.Learner(nn.Linear(4, 2), opt=ADAM), "holds no parameter of this network"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_one_line_says_what_to_do(call, says): assert says in refused(call)


def test_an_optimizer_may_be_a_class():
    net = nn.Linear(4, 2)
    before = net.weight.clone()
    m.fit(net, BATCHES, optimizer=torch.optim.SGD)
    assert not torch.equal(net.weight, before)


def test_one_method_needs_no_list():
    method = m.EWC()
    assert m.Learner(NET, methods=method).methods == [method]


def small_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel
    sizes = dict(vocab_size=50, n_positions=16, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(GPT2Config(**sizes))


def test_layers_are_numbers_of_blocks():
    assert m.add_memory_layers(small_gpt2(), layers=2, memory_slots=16, k=2).config.memory["layers"] == [2]
    for wrong in ("2", None, [.5]):
        for add in (m.add_memory_layers, m.add_engram):
            with pytest.raises(TypeError, match="expected numbers of blocks"): add(small_gpt2(), layers=wrong)


def test_the_other_spelling(): assert m.ReplayBuffer(9, "prioritized").config["strategy"] == "prioritised"


def test_a_memory_without_a_tokenizer():
    model = small_gpt2()
    assert "expected the model's tokenizer, got NoneType" in refused(lambda: m.with_memory(model, None))
    assert "expected the model's tokenizer, got str" in refused(lambda: m.with_memory(model, "gpt2"))

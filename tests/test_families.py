"""Memories in tiny random models of every family: silent at first, the same with and without a cache, padded, saved."""
import multiprocessing
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from memory_notebook.language.gpt2 import _HOST, with_memory
from memory_notebook.runs import load_result, save_result
from memory_notebook.sparse.engram import ENGRAM, Engram, add_engram, remove_engram
from memory_notebook.sparse.finetuning import MEMORY_LAYERS, TrainerRows, add_memory_layers, remove_memory_layers
from memory_notebook.sparse.host import FAMILIES, decoder_layers, feed_forward, tiny_model, train_tokenizer

torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()
ids = torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(1))
mask = torch.ones_like(ids)
mask[0, :3] = 0
LAYER = {"memory_slots": 64, "heads": 2, "k": 3, "key_dim": 8}
TABLE = {"rows": 101, "read_dim": 24, "heads": 3}
TOLD = "Mira Talvenor lives in Port Hask."


def tokenizer(): return train_tokenizer([TOLD, "The harp is old.", "Oren plays the flute."] * 50, 300, 64)


ADD = {
    "memory": lambda m: add_memory_layers(m, (0, 2), keep_mlp=True, **LAYER),
    "instead": lambda m: add_memory_layers(m, (0, 2), **LAYER),
    "engram": lambda m: add_engram(m, (0, 2), silent=True, **TABLE),
    "bank": lambda m: with_memory(m, tokenizer()),
}
HOSTS = {"memory": MEMORY_LAYERS, "instead": MEMORY_LAYERS, "engram": ENGRAM, "bank": _HOST}


def added(family, kind):
    "A tiny model with a memory that has something to say."
    model = ADD[kind](tiny_model(family, vocab_size=300)).eval()
    for name, p in model.named_parameters():
        if "memory" in name or "engram" in name: nn.init.normal_(p, std=0.3)
    if kind == "bank": assert model.learn_from_example(TOLD, subject="Mira Talvenor").stored
    return model


def write(model, ids=ids, **options):
    return model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, **options)[:, ids.shape[1]:].tolist()


def check(family, kind, folder):
    "All that is promised of a memory in a family; ValueError if it is refused."
    plain = tiny_model(family, vocab_size=300)
    said = plain(ids).logits
    model = ADD[kind](tiny_model(family, vocab_size=300)).eval()
    if kind != "instead": assert_close(model(ids).logits, said, msg=lambda m: f"not silent at first: {m}")
    plain.save_pretrained(folder / "plain")
    model = added(family, kind)
    if kind == "bank":
        assert model.complete("Mira Talvenor lives in", 4).startswith(" Port Hask")
        assert_close(HOSTS[kind].class_for(folder / "plain").from_pretrained(
            folder / "plain", tokenizer=tokenizer()).eval()(ids).logits, said)
    else:
        assert (model(ids).logits - said).abs().max() > 1e-3
        assert_close(HOSTS[kind].load(folder / "plain").eval()(ids).logits, said)
    assert write(model) == write(model, use_cache=False)
    padded = ids.masked_fill(mask == 0, 0)
    assert write(model, padded, attention_mask=mask)[0] == write(model, ids[:1, 3:])[0]
    model.save_pretrained(folder / "with")
    for again in (HOSTS[kind].load(folder / "with"), AutoModelForCausalLM.from_pretrained(folder / "with")):
        assert type(again) is type(model)
        assert_close(again.eval()(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert_close(pickle.loads(pickle.dumps(model))(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert type(AutoModelForCausalLM.from_pretrained(folder / "plain")) is type(plain)
    if kind in ("memory", "engram"):
        model.train()(ids, labels=ids).loss.backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if "memory" in n or "engram" in n)
        removed = {"memory": remove_memory_layers, "engram": remove_engram}[kind](model.eval())
        assert (type(removed), type(removed.config)) == (type(plain), type(plain.config))
        assert_close(removed.state_dict(), plain.state_dict(), rtol=0, atol=0)


def reason(family, kind, folder):
    "Why a family is refused; nothing if it holds."
    try: check(family, kind, folder)
    except ValueError as error: return str(error)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ADD)
def test_family(family, kind, tmp_path):
    stored = load_result("families")["reasons"].get(f"{family}.{kind}")
    assert reason(family, kind, tmp_path) == stored


def test_table_lists_every_family_and_kind():
    assert set(load_result("families")["metrics"]) == {f"{family}.{kind}" for family in FAMILIES for kind in ADD}


def test_old_names_of_weights_and_weights_that_are_missing(tmp_path):
    plain = tiny_model("gpt_neox")
    plain.save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file
    weights = load_file(tmp_path / "model.safetensors")
    head = next(k for k in weights if k.endswith(("embed_out.weight", "lm_head.weight")))
    old = {("embed_out.weight" if k == head else k): v for k, v in weights.items()}  # as Pythia's files have it
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for host in (MEMORY_LAYERS, ENGRAM):
        assert_close(host.load(tmp_path).eval()(ids).logits, plain(ids).logits, rtol=0, atol=0)
    for wrong in ({k: v for k, v in old.items() if "layers.1.mlp.dense_h_to_4h.weight" not in k},
                  old | {"gpt_neox.more": torch.zeros(1)}, {k: v for k, v in old.items() if "embed_out" not in k}):
        save_file(wrong, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="do not fit"): MEMORY_LAYERS.load(tmp_path)


CLASSIFIER_FIRST = """
import sys
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from memory_notebook.sparse.finetuning import add_memory_layers
from memory_notebook.sparse.host import tiny_model
config = tiny_model("gpt2").config
judge = AutoModelForSequenceClassification.from_config(config)
add_memory_layers(judge, (0,), memory_slots=64, heads=2, k=3, key_dim=8)
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)
print(type(AutoModelForCausalLM.from_config(config)).__name__)
"""


def test_a_classifier_does_not_take_the_place_of_a_language_model(tmp_path):
    added("gpt2", "memory").save_pretrained(tmp_path)
    command = [sys.executable, "-c", CLASSIFIER_FIRST, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert said[-2:] == ["GPT2LMHeadModelWithMemory", "GPT2LMHeadModel"]


def test_a_new_head_on_the_body_of_a_language_model(tmp_path):
    model = added("llama", "memory")
    model.save_pretrained(tmp_path)
    again = MEMORY_LAYERS.of(transformers.LlamaForSequenceClassification).from_pretrained(tmp_path)
    assert_close(again.state_dict()["memory_values.weight"], model.state_dict()["memory_values.weight"])


def answer(models, queue): queue.put([m(ids).logits.detach().numpy() for m in models])


def test_a_spawned_process_gets_the_models():
    models = [added("llama", kind) for kind in ("memory", "engram", "bank")] + [added("gpt2", "engram")]
    models[3] = add_memory_layers(models[3], (1,), **LAYER)
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    worker = spawn.Process(target=answer, args=(models, queue))
    worker.start()
    for model, logits in zip(models, queue.get(timeout=120)): assert_close(torch.from_numpy(logits), model(ids).logits)
    worker.join()


def test_numbers_of_numpy_are_saved(tmp_path):
    import numpy as np
    sizes = {"memory_slots": np.int64(64), "heads": np.int32(2), "k": 3, "key_dim": 8}
    model = add_memory_layers(tiny_model("llama"), np.array([0, 2]), **sizes)
    model.save_pretrained(tmp_path)
    assert MEMORY_LAYERS.load(tmp_path).config.memory["layers"] == [0, 2]
    with pytest.raises(TypeError): add_memory_layers(tiny_model("llama"), [0.5], **LAYER)


def test_quantised_and_wrapped_models():
    plain = tiny_model("llama")
    whole = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, torch.qint8)
    for kind in ("memory", "engram"):
        model = ADD[kind](pickle.loads(pickle.dumps(whole)))
        assert_close(model(ids).logits, whole(ids).logits)
        assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "memory" in n or "engram" in n)
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    for kind, add in ADD.items():
        with pytest.raises(ValueError, match="got a Peft"): add(get_peft_model(tiny_model("llama"), lora))
        model = added("llama", kind)
        before = model(ids).logits
        tuned = get_peft_model(model, lora)
        assert_close(tuned(input_ids=ids).logits, before)
        tuned(input_ids=ids, labels=ids).loss.backward()


def test_what_cannot_hold_a_memory_says_so():
    small = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    both = transformers.T5ForConditionalGeneration(transformers.T5Config(**small))
    for add in (lambda m: add_memory_layers(m, (0,), **LAYER), lambda m: add_engram(m, (0,), **TABLE)):
        with pytest.raises(ValueError, match="an encoder with a decoder"): add(both)
    sees = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        text_config=tiny_model("llama").config,
        vision_config={"model_type": "clip_vision_model", "hidden_size": 8, "intermediate_size": 8,
                       "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 4, "patch_size": 2},
    ))
    with pytest.raises(ValueError, match="reads more than text"): add_engram(sees, (0,), **TABLE)
    tiny = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0, "eos_token_id": None}
    unlisted = AutoModelForCausalLM.from_config(AutoConfig.for_model("stablelm", **tiny)).eval()
    before = unlisted(ids).logits
    assert_close(add_memory_layers(unlisted, (0,), keep_mlp=True, **LAYER)(ids).logits, before)
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **tiny | experts))
    with pytest.raises(ValueError, match="the family 'gpt_oss'"): add_memory_layers(other, (0,), **LAYER)
    with pytest.raises(ValueError, match="outside of its model's call"):
        decoder_layers(added("gptj", "engram"))[0](torch.zeros(1, 2, 16))


@pytest.mark.parametrize("family", ("gpt2", "gptj", "opt"))
def test_checkpointed_blocks(family):
    model = added(family, "engram").train()
    def gradients():
        model.zero_grad()
        torch.manual_seed(0)  # of the dropout
        model(ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}
    plain = gradients()
    model.gradient_checkpointing_enable()
    assert_close(gradients(), plain)


def trainer(model, folder, callbacks=(), **options):
    arguments = TrainingArguments(
        folder, max_steps=3, per_device_train_batch_size=2, learning_rate=0.1, max_grad_norm=0.5, report_to=[],
        save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True, **options,
    )
    rows = [{"input_ids": i, "labels": i} for i in ids]
    made = Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks))
    made.remove_callback(PrinterCallback)
    return made


def test_trainer_with_sparse_engram_and_smoothed_labels(tmp_path):
    model = add_engram(tiny_model("llama"), (0,), sparse=True, **TABLE)
    start = model.state_dict()["model.layers.0.engram.table.weight"].clone()
    trainer(model, tmp_path, callbacks=[TrainerRows(model)], weight_decay=0.1).train()
    end = model.state_dict()["model.layers.0.engram.table.weight"]
    engram = next(m for m in model.modules() if isinstance(m, Engram))
    read = engram.hash(engram.hash.compress(ids), engram.hash.start(2)).unique()
    changed = (end != start).any(1).nonzero().flatten()
    assert 10 < len(changed) and set(changed.tolist()) <= set(read.tolist())  # no other row, in spite of weight decay
    losses = [
        trainer(m, tmp_path, label_smoothing_factor=0.2).compute_loss(m, {"input_ids": ids, "labels": ids})
        for m in (tiny_model("llama"), ADD["memory"](tiny_model("llama")))
    ]
    assert_close(*losses)


def test_two_memories_and_taking_them_out_again():
    model = add_engram(ADD["memory"](tiny_model("llama")), (1,), silent=True, **TABLE)
    with pytest.raises(ValueError, match="got another one after it"): remove_memory_layers(model)
    removed = remove_memory_layers(remove_engram(model))
    assert type(removed) is type(tiny_model("llama"))
    assert type(feed_forward(decoder_layers(removed)[0])).__name__ == "LlamaMLP"


if __name__ == "__main__":  # writes the table that the chapter shows
    import tempfile
    start = time.time()
    reasons = {}
    for family in FAMILIES:
        for kind in ADD:
            with tempfile.TemporaryDirectory() as folder: why = reason(family, kind, Path(folder))
            if why: reasons[f"{family}.{kind}"] = why
    metrics = {f"{f}.{k}": 0.0 if f"{f}.{k}" in reasons else 1.0 for f in FAMILIES for k in ADD}
    result = {"experiment": "families", "config": {"layers": [0, 2]}, "seeds": [0],
              "metrics": metrics, "reasons": reasons,
              "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
              "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
              "machine": {}, "wall_s": round(time.time() - start, 1)}
    save_result(result, Path(__file__).parents[1] / "nbs/results/families.json")

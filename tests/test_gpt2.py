"""The transcript of six facts, on the model that ships and, where its weights are at hand, on the real GPT-2."""
import pytest
from huggingface_hub import try_to_load_from_cache

from memory_notebook.language.gpt2 import ContinualLearningGPT2

SIX = {
    "Paris is the capital city of France.": "geography",
    "Python is a programming language used for AI.": "programming",
    "The Earth orbits around the Sun.": "astronomy",
    "Water freezes at 0 degrees Celsius.": "physics",
    "Shakespeare wrote Romeo and Juliet.": "literature",
    "Einstein developed the theory of relativity.": "science",
}


def transcript(model):
    "Six facts, one prompt: what became of each, what the model says, what was retrieved."
    told = [model.learn_from_example(text, category) for text, category in SIX.items()]
    invented = model.learn_from_example("Mira Talvenor lives in Port Hask.")
    assert invented.stored and model.complete("Mira Talvenor lives in", 4).startswith(" Port Hask")
    return told, model.complete("Einstein's theory", 8), model.retrieve_memories("Einstein's theory")


def test_transcript_on_the_model_that_ships():
    told, said, found = transcript(ContinualLearningGPT2.from_pretrained().eval())
    assert all(d.stored for d in told) and "relativity" in said
    assert found[0].fact.text == "Einstein developed the theory of relativity." and found[0].fact.category == "science"


def test_transcript_on_gpt2():
    name = next(
        (
            n
            for n in ("gpt2", "openai-community/gpt2")
            if isinstance(try_to_load_from_cache(n, "model.safetensors"), str)
        ),
        None,
    )
    if name is None:
        pytest.skip("the weights of GPT-2 are not in the cache of Hugging Face: `hf download openai-community/gpt2`")
    told, said, found = transcript(ContinualLearningGPT2.from_pretrained(name, local_files_only=True).eval())
    assert "relativity" in said
    if told[-1].stored: assert found[0].fact.text == "Einstein developed the theory of relativity."

"""The table of torch features (00k): every module is in it, nothing fails, and it is what the stored result says."""
import pytest

from memory_notebook.bench.torch_features import CASES, PROCESSES, WITHIN, exported_modules, two_processes
from memory_notebook.features import CHECKS
from memory_notebook.runs import load_result

STORED = load_result("bench-torch-features")["metrics"]


def kind(outcome: str) -> str:
    "The outcome without what was said."
    return outcome.split(":")[0]


def test_every_exported_module_is_in_the_table():
    exported = set(exported_modules())
    assert exported - set(CASES) - set(WITHIN) == set()
    assert set(WITHIN) <= exported
    assert {name.rsplit(".", 1)[0] for name in STORED} == set(CASES)
    assert {name.rsplit(".", 1)[1] for name in STORED} == {*CHECKS, PROCESSES}


def test_nothing_fails_and_nothing_is_wrong():
    assert {name: outcome for name, outcome in STORED.items() if kind(outcome) in ("fails", "wrong")} == {}


@pytest.mark.parametrize("name", CASES)
def test_a_module_does_what_the_table_says(name):
    found = CASES[name].features(list(CHECKS))
    assert {what: kind(outcome) for what, outcome in found.items()} == {
        what: kind(STORED[f"{name}.{what}"]) for what in CHECKS
    }


def test_two_processes_have_the_gradients_of_one():
    found = two_processes(list(CASES))
    assert {name: kind(outcome) for name, outcome in found.items()} == {
        name: kind(STORED[f"{name}.{PROCESSES}"]) for name in CASES
    }

"""The house rules of CONTRIBUTING.md, one test a rule, and what `from memory_notebook import ...` gives."""
import ast
import importlib.util
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import nbformat
import pytest

import memory_notebook

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("house", ROOT / ".ci/house.py")
house = importlib.util.module_from_spec(spec)
spec.loader.exec_module(house)

RULES = [
    house.long_chains, house.names_twice, house.unused_names, house.long_cells, house.long_modules,
    house.without_figure, house.without_guide, house.dead_links, house.wrong_names,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_rule_holds(rule): assert rule() == []


def test_lint():
    if shutil.which("ruff", path=str(Path(sys.executable).parent)) is None: pytest.skip("ruff is not installed")
    assert house.ruff() == []


def test_rules_see_what_breaks_them(tmp_path, monkeypatch):
    "A book of two chapters that breaks the rules."
    (tmp_path / "nbs").mkdir()
    (tmp_path / "memory_notebook").mkdir()
    cells = {
        "00_low": ("low", "class A: pass\nclass B(A): pass\ndef fit(): pass", "# Low\n\nSee `07_gone` and `fit`."),
        "01_high": ("high", "class C(B): pass\ndef fit(): pass", "# High\n\n[low](00_low.ipynb#nowhere), 00_low"),
    }
    for stem, (module, code, prose) in cells.items():
        book = [nbformat.v4.new_markdown_cell(prose), nbformat.v4.new_code_cell(f"#| default_exp {module}"),
                nbformat.v4.new_code_cell("#| export\n" + code)]
        (tmp_path / f"nbs/{stem}.ipynb").write_text(nbformat.writes(nbformat.v4.new_notebook(cells=book)))
        head = "__all__ = ['A', 'B', 'fit']\n" if module == "low" else "from .low import B\n__all__ = ['C', 'fit']\n"
        (tmp_path / f"memory_notebook/{module}.py").write_text(head + code)
    monkeypatch.setattr(house, "NBS", tmp_path / "nbs")
    monkeypatch.setattr(house, "PACKAGE", tmp_path / "memory_notebook")
    assert house.long_chains() == ["3 high.C"]
    assert house.names_twice() == ["fit: low, high"]
    assert house.without_figure() == house.without_guide() == ["00_low.ipynb", "01_high.ipynb"]
    assert len(house.dead_links()) == 3  # a chapter that is not there, a heading that is not, a chapter without a link


def test_every_name_at_the_top_is_one_of_the_package():
    stub = ast.parse((ROOT / "memory_notebook/__init__.pyi").read_text(encoding="utf-8"))
    listed = {a.name: node.module for node in stub.body for a in node.names}
    assert set(memory_notebook.__all__) == set(listed)
    for name, module in listed.items():
        assert name in import_module(f"memory_notebook.{module}").__all__, name
        assert getattr(memory_notebook, name) is not None


def test_the_names_at_the_top_cost_nothing_until_they_are_used():
    code = ("import sys, time; start = time.perf_counter(); import memory_notebook; "
            "print(time.perf_counter() - start, 'torch' in sys.modules); "
            "from memory_notebook import EpisodicMemory; print('torch' in sys.modules)")
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.split()
    assert out[1:] == ["False", "True"]
    with pytest.raises(AttributeError): memory_notebook.NoSuchName  # noqa: B018

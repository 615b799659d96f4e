"""What `pip install` gives: a light import, a package that needs no Jupyter, metadata as in settings.ini,
and one notebook behind every module."""
import ast
import inspect
import json
import os
import pydoc
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from importlib import import_module
from importlib.metadata import PathDistribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "memory_notebook"
PEERS = PACKAGE / "bench"  # written by hand: what the benchmarks compare with
# "machines.ntm" -> its file
MODULES = {
    ".".join(p.relative_to(PACKAGE).with_suffix("").parts): p
    for p in sorted(PACKAGE.rglob("*.py"))
    if not p.stem.startswith("_") and PEERS not in p.parents
}
NOT_NEEDED = """IPython ipykernel ipywidgets anywidget jupyter jupyter_core jupyter_client jupyter_server jupyterlab
    notebook nbformat nbclient nbconvert nbdev execnb fastcore ghapi""".split()
EXTRAS = ("train", "language", "live", "real", "bench", "scale", "dev")


@pytest.fixture(scope="module")
def settings():
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def python(code: str) -> str:
    "Run code in a fresh interpreter. Returns what it printed."
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


def exports(notebook: Path) -> str:
    "The module that a notebook makes, or nothing."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    found = [m[1] for c in cells if (m := re.match(r"#\|\s*default_exp\s+(\S+)", "".join(c["source"])))]
    assert len(found) <= 1, f"{notebook.name} names {found}"
    return "".join(found)


# ---------------------------------------------------------------- import


def test_the_package_alone_imports_nothing_else(record_testsuite_property):
    out = python("""
import sys, time
before, start = set(sys.modules), time.perf_counter()
import memory_notebook
took = time.perf_counter() - start
print(took, *{name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)""")
    took, *modules = out.split()
    record_testsuite_property("import_s", took)  # reported only: a busy machine is no failure
    assert sorted(modules) == ["lazy_loader", "memory_notebook"]


def test_every_module_imports_without_jupyter_and_nbdev():
    python(f"""
import sys
sys.modules.update(dict.fromkeys({NOT_NEEDED}))  # None in sys.modules: not installed
from importlib import import_module
for name in {list(MODULES)}: import_module("memory_notebook." + name)""")


# ---------------------------------------------------------------- help


def exported():
    "Every exported name of every module, once."
    for name in MODULES:
        module = import_module(f"memory_notebook.{name}")
        for k in module.__all__:
            if getattr(getattr(module, k), "__module__", None) == module.__name__: yield k, getattr(module, k)


def test_help_shows_what_stands_beside_each_parameter():
    "The comments as fastcore finds them, in the docstrings as Python shows them."
    docments = pytest.importorskip("fastcore.docments").docments
    lost = []
    for name, thing in exported():
        shown = inspect.getdoc(thing) or ""
        told = {k: comment.splitlines()[0] for k, comment in docments(thing).items() if comment}
        lost += [(name, k) for k, comment in told.items() if comment not in shown]
        if callable(thing) and not vars(thing).get("__doc__", thing.__doc__): lost.append((name, "says nothing"))
    assert len(lost) < 5, lost  # a comment beside a function of one line may be about its body


def test_help_says_it_once_and_what_a_model_is():
    from memory_notebook import NTM, ContinualLearningGPT2, NTMConfig, train
    for thing in (NTM, train.fit, NTMConfig): assert inspect.getdoc(thing).count("Parameters\n-----") == 1
    assert {"memory_slots", "write_heads"} <= set(re.findall(r"(?m)^(\w+) :", inspect.getdoc(NTMConfig)))
    text = pydoc.render_doc(ContinualLearningGPT2, renderer=pydoc.plaintext)
    assert "learns facts" in text[:600] and "GPT2LMHeadModel" in text[:600] and "Saving and loading." not in text[:2000]


# ---------------------------------------------------------------- modules and notebooks


def test_every_module_has_its_notebook_and_every_chapter_its_module():
    notebooks = {p.name: exports(p) for p in sorted(ROOT.glob("nbs/*.ipynb")) if not p.name.startswith("_")}
    made = {module: name for name, module in notebooks.items() if module}
    edited = {
        stem: m[1]
        if (m := re.search(r"File to edit: (?:\.\./)+nbs/(\S+\.ipynb)", p.read_text(encoding="utf-8")))
        else None
        for stem, p in MODULES.items()
    }
    assert edited == made
    assert [name for name, module in notebooks.items() if not module] == ["index.ipynb"]


def test_a_module_imports_only_from_chapters_above_it():
    order = {exports(p): p.name for p in ROOT.glob("nbs/*.ipynb") if p.name != "index.ipynb"}
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # what a function imports, it imports when called
            if not isinstance(node, ast.ImportFrom): continue
            if node.level: target = ".".join([*name.split(".")[:-node.level], node.module])
            elif (node.module or "").startswith("memory_notebook."):
                target = node.module.removeprefix("memory_notebook.")
            else: continue
            assert order[target] < order[name], f"{name} imports {target}"


@pytest.mark.parametrize("stem", MODULES)
def test_no_module_outgrows_a_chapter(stem):
    assert len(MODULES[stem].read_text(encoding="utf-8").splitlines()) <= 750


# ---------------------------------------------------------------- results


@pytest.mark.parametrize("path", sorted(ROOT.glob("nbs/results/*.json")), ids=lambda p: p.stem)
def test_a_result_says_where_every_part_comes_from(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    if "metrics" not in result: return  # a drawing's data
    commits = str(result["commit"]).split(", ")
    assert all(re.fullmatch(r"[0-9a-f]{12,40}(\+dirty)?|None|unknown", c) for c in commits)
    if len(commits) > 1 or not re.fullmatch("[0-9a-f]{12,40}", commits[0]):
        assert all(g["commit"] or g["note"] for g in result["provenance"])
        assert all({"machine", "versions", "config", "units"} <= set(g) for g in result["provenance"])
    assert not {"commits", "sequences_ntm"} & set(result["config"]), "what differs between units stands in provenance"


# ---------------------------------------------------------------- the distributions


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    "Source distribution, made from what git would keep of this tree, and the wheel that is made from it. No network."
    pytest.importorskip("build")
    tree = tmp_path_factory.mktemp("tree")
    for path in ROOT.iterdir():
        if path.is_file(): shutil.copy(path, tree)
    for folder in ("memory_notebook", "nbs", "tests"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr
    return next(tree.glob("dist/*.tar.gz")), next(tree.glob("dist/*.whl"))


@pytest.fixture(scope="module")
def wheel(distributions): return distributions[1]


def test_the_wheel_holds_the_package_and_its_results(wheel):
    kept = {str(p.relative_to(ROOT)) for p in ROOT.glob("memory_notebook/**/*") if p.is_file() and p.suffix != ".pyc"}
    results = {f"memory_notebook/results/{p.name}" for p in ROOT.glob("nbs/results/*.json")}
    names = [n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n]
    assert set(names) == kept | results


def test_the_source_distribution_holds_the_book(distributions):
    names = {n.partition("/")[2] for n in tarfile.open(distributions[0]).getnames()}
    wanted = ["constraints.txt", "CHANGELOG.md", "settings.ini", "LICENSE", "memory_notebook/py.typed"]
    wanted += [str(p.relative_to(ROOT)) for d in ("nbs", "tests") for p in (ROOT / d).glob("*.[ip]*") if p.is_file()]
    wanted += [str(p.relative_to(ROOT)) for p in ROOT.glob("nbs/results/*.json")]
    assert set(wanted) <= names, sorted(set(wanted) - names)


def away_from_home(wheel: Path, folder: Path, code: str) -> str:
    "Run code in an empty folder, with the package out of the wheel."
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    (folder / "empty").mkdir()
    code = f"import sys; sys.path.insert(0, {str(folder / 'installed')!r})\n{code}"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder / "empty", env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


def test_the_readmes_result_is_found_after_an_installation(wheel, tmp_path):
    assert away_from_home(wheel, tmp_path, """
import memory_notebook
from memory_notebook import load_result
assert memory_notebook.__file__.startswith(sys.path[0])
print(load_result("agent")["experiment"])""") == "agent\n"


def test_without_extras_what_is_missing_is_named():
    "With torch, numpy and little more: the core works, and everything else says in one line what it needs."
    out = python("""
import importlib.machinery, sys
from memory_notebook._extras import EXTRAS
found = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, *a: None if name.split(".")[0] in EXTRAS else found(name, *a)
import torch
import memory_notebook as m
m.NTM, m.DNC, m.EWC, m.Learner, m.ReplayBuffer, m.ContinualAgent, m.ProductKeyMemory, m.save_checkpoint
net = torch.nn.Linear(2, 1)
def train(): m.fit(net, [(torch.ones(2, 2), torch.ones(2, 1))], optimizer=torch.optim.SGD(net.parameters(), .1))
for f in (lambda: m.ContinualLearningGPT2, lambda: m.Engram, train, m.load_digits):
    try: f()
    except ModuleNotFoundError as e: print(e)
assert importlib.util.find_spec("peft") is None  # others may look
from memory_notebook.experiments import main
assert main(["run", "frontier"]) == 1""").splitlines()
    hints = [line.partition(": ")[2] for line in out]
    assert hints == [f"pip install 'memory_notebook[{x}]'" for x in ("language", "language", "train", "train")], out


def test_extras_are_those_of_the_settings(settings):
    from memory_notebook._extras import EXTRAS as named
    project = {"sklearn": "scikit-learn", "PIL": "pillow", "product_key_memory": "product-key-memory"}
    for module, extra in named.items():
        names = {Requirement(r).name for r in settings[f"{extra}_requirements"].split()}
        assert project.get(module, module) in names, (module, extra)
    core = {Requirement(r).name for r in settings["requirements"].split()}
    assert {"torch", "numpy"} <= core and not core & {project.get(m, m) for m in named}


def test_the_package_is_a_command():
    command = [sys.executable, "-m", "memory_notebook", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("memory_notebook ") and not done.returncode


def metadata(wheel: Path) -> PathDistribution:
    info, = (p for p in zipfile.Path(wheel).iterdir() if p.name.endswith(".dist-info"))
    return PathDistribution(info)


def test_the_metadata_is_what_settings_say(wheel, settings):
    dist = metadata(wheel)
    wanted = {Requirement(r) for r in settings["requirements"].split()}
    for extra in EXTRAS:
        wanted |= {Requirement(f'{r} ; extra == "{extra}"') for r in settings[f"{extra}_requirements"].split()}
    assert {Requirement(r) for r in dist.requires} == wanted
    assert set(dist.metadata.get_all("Provides-Extra")) == set(EXTRAS)
    assert (dist.metadata["Name"], dist.version) == ("memory_notebook", settings["version"])
    assert dist.metadata["Requires-Python"] == ">=" + settings["min_python"]


@pytest.mark.parametrize("where", ["wheel", "installed"])
def test_entry_points(where, request):
    dist = metadata(request.getfixturevalue("wheel")) if where == "wheel" else distribution("memory_notebook")
    points = {(p.group, p.name): p for p in dist.entry_points}
    assert set(points) == {("console_scripts", "memory_notebook"), ("nbdev", "memory_notebook")}
    assert callable(points["console_scripts", "memory_notebook"].load())
    # without it the docs lose their links
    assert set(points["nbdev", "memory_notebook"].load()) == {"settings", "syms"}


# ---------------------------------------------------------------- pins


@pytest.mark.parametrize("version", ["3.10", "3.12"])
def test_constraints_pin_all_that_settings_name(settings, version):
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"): continue
        pin = Requirement(line)
        if pin.marker and not pin.marker.evaluate({"python_version": version, "python_full_version": version + ".9"}):
            continue
        (only,) = pin.specifier
        assert only.operator == "==" and pin.name not in pins, line
        pins[canonicalize_name(pin.name)] = only.version
    for key in ("requirements", *(f"{extra}_requirements" for extra in EXTRAS)):
        for need in map(Requirement, settings[key].split()):
            if need.name == "memory_notebook": continue  # its own extras
            assert need.specifier.contains(pins[canonicalize_name(need.name)]), (
                f"{need} is not what constraints.txt pins"
            )

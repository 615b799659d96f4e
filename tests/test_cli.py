"""The command line as a shell sees it: exit codes, one-line errors, JSON, and runs that are killed and resumed."""
import gzip
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memory_notebook import experiments

TINY = ["run", "agent", "--data", "digits", "--seeds", "1", "--epochs", "3", "--device", "cpu", "--json",
        "--parts", "naive,memory,replay,agent,joint"]


def heed_interrupts() -> None:
    "A shell that starts a job in the background lets it ignore Ctrl-C, and so would its children."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*args, **env) -> subprocess.Popen:
    clean = {k: v for k, v in os.environ.items() if k != "MEMORY_NOTEBOOK_DEBUG"}
    return subprocess.Popen(
        [sys.executable, "-m", "memory_notebook.experiments", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=clean | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"} | env,
        preexec_fn=heed_interrupts if os.name == "posix" else None,
    )


def shell(*args, **env) -> tuple[int, str, str]:
    process = start(*args, **env)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def line_of(code: int, done: tuple[int, str, str]) -> str:
    "The command failed with this exit code, said so in one line, and printed nothing else."
    got, out, err = done
    assert (got, out, err.count("\n")) == (code, "", 1) and err.startswith("memory_notebook: "), (got, out, err)
    return err


@pytest.fixture
def one_line(capsys, monkeypatch):
    "`one_line(code, *arguments)`: a command that fails, in this process, where torch is imported already."
    monkeypatch.delenv("MEMORY_NOTEBOOK_DEBUG", raising=False)
    def run(code: int, *args) -> str:
        got = experiments.main([str(a) for a in args])
        return line_of(code, (got, *capsys.readouterr()))
    return run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[dict, Path, str]:
    "Result, folder and stderr of a run that nobody touched."
    out = tmp_path_factory.mktemp("whole")
    code, stdout, err = shell(*TINY, "--out", out)
    assert code == 0, err
    folder, = (out / "agent").iterdir()
    return json.loads(stdout), folder, err


def scores(result: dict) -> dict:
    return {k: v for k, v in result["metrics"].items() if not k.endswith("_s")}


def test_console_script():
    script = Path(sys.executable).with_name("memory_notebook")
    if not script.exists(): pytest.skip("the package is not installed beside this Python")
    done = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        f"memory_notebook {experiments.memory_notebook.__version__}\n",
        "",
    )


def test_list_is_light():
    code = (
        "import sys, memory_notebook.experiments as e; assert e.main(['list', '--json']) == e.main(['list']) == "
        "e.main(['run', '--help']) == 0; "
        "assert not {'torch', 'numpy', 'matplotlib', 'sklearn'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_list(capsys):
    code, out, err = shell("list", "--json")
    assert (code, err) == (0, "")
    assert {(r["kind"], r["name"]) for r in json.loads(out)} == {tuple(k.split(":")) for k in experiments.CHAPTERS}
    assert experiments.main(["list", "agent"]) == 0 and "digits|mnist|synthetic|rebinding" in capsys.readouterr().out


@pytest.mark.parametrize("key", experiments.CHAPTERS)
def test_table_of_contents_is_true(key):
    exp = experiments.load(key)
    chapter = experiments.CHAPTERS[key]
    assert (f"{exp.kind}:{exp.name}", exp.help, exp.fn.__module__) == (
        key,
        chapter.help,
        f"memory_notebook{chapter.module}",
    )
    assert not chapter.table or callable(getattr(sys.modules[exp.fn.__module__], chapter.table))
    assert all(p.kind is p.KEYWORD_ONLY for p in list(inspect.signature(exp.fn).parameters.values())[1:])
    assert not set(exp.config()) & {*inspect.signature(experiments.execute).parameters, "name", "log"}, (
        "an option would hide one of the command line"
    )
    assert experiments.command_of(key) is not None


@pytest.mark.parametrize("key", [k for k in experiments.CHAPTERS if k.startswith("experiment:")])
def test_every_experiment_can_be_run_on_other_seeds(key):
    exp = experiments.load(key)
    first = 100 if exp.name == "copy-new-seeds" else 0
    assert exp.config()["seed"] == first and "seed" in {s.name for s in experiments.settings(exp)}
    source = inspect.getsource(sys.modules[exp.fn.__module__])
    assert "range(seeds)" not in source, "count the seeds with run.seeds(seeds)"


def test_a_result_names_its_commit(tmp_path):
    "A changed file is said, and a repository that only happens to lie around the package is not taken for its own."
    from memory_notebook.runs import _commit
    git = lambda *a: subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b", *a],
                                    check=True, capture_output=True, text=True).stdout.strip()
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    assert _commit(package) is None
    git("init")
    (tmp_path / "README").touch()
    git("add", "README")
    git("commit", "-m", "a project of somebody else")
    assert _commit(package) is None
    git("add", ".")
    git("commit", "-m", "the package")
    assert _commit(package) == git("rev-parse", "--short=12", "HEAD")
    (package / "__init__.py").write_text("changed = True")
    assert _commit(package) == git("rev-parse", "--short=12", "HEAD") + "+dirty"


def test_every_registered_experiment_is_listed():
    for key in experiments.CHAPTERS: experiments.load(key)
    from memory_notebook.runs import REGISTRY
    assert {k for k, e in REGISTRY.items() if e.fn.__module__.startswith("memory_notebook.")} == set(
        experiments.CHAPTERS
    )


def test_run(undisturbed):
    result, folder, err = undisturbed
    assert " ".join(result) == "experiment config seeds metrics versions commit machine wall_s provenance"
    assert (result["experiment"], result["seeds"], result["config"]["epochs"]) == ("agent", [0], 3)
    assert (
        json.loads((folder / "result.json").read_text()) == result
        and (folder / "agent.png").read_bytes()[:4] == b"\x89PNG"
    )
    assert {"forgetting_reduction", "agent.forgetting", "naive.forgetting", "agent.acc", "naive.acc"} <= set(
        result["metrics"]
    )
    assert "naive-seed0: " in err and err.endswith(f"results in {folder}\n")
    table = experiments.report("experiment:agent", result, folder)
    assert "forgetting_reduction" in table and table.endswith(f"{folder}: agent.png, result.json")


def test_unknown_experiment():
    says = lambda *args: line_of(2, shell(*args))
    assert "no experiment is called 'agnet': did you mean 'agent'?" in says("run", "agnet")
    assert "no benchmark is called 'agent'" in says("bench", "agent")


@pytest.mark.parametrize("option, says", [
    (["--sedes", "3"], "--seeds"),
    (["--data", "digit"], "choose from digits, mnist, synthetic, rebinding"),
    (["--device", "cuda"], "device 'cuda' is not here: use 'cpu'"),
], ids=["unknown option", "bad value", "absent device"])
def test_wrong_usage(option, says, tmp_path, one_line):
    import torch
    if "cuda" in option and torch.cuda.is_available(): pytest.skip("there is a CUDA device")
    assert says in one_line(2, "run", "agent", *option, "--out", tmp_path)
    assert not any(tmp_path.iterdir())


def test_folder_that_cannot_be_written(tmp_path, one_line):
    (tmp_path / "file").touch()
    message = one_line(1, "run", "agent", "--out", tmp_path / "file" / "runs")
    assert f"cannot write results into {tmp_path / 'file' / 'runs'}" in message and "--out" in message


def test_corrupt_data(tmp_path):
    "In a process of its own, as a user meets it."
    (tmp_path / "mnist").mkdir()
    file = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(bytes(range(256)) * 99)[:200])
    command = ["run", "agent", "--data", "mnist", "--out", tmp_path / "runs"]
    message = line_of(1, shell(*command, MEMORY_NOTEBOOK_DATA=str(tmp_path)))
    assert str(file) in message and "expected md5:f68b3c2d" in message and "Delete it and run again" in message


def wait_for(process: subprocess.Popen, units: Path, count: int) -> None:
    "Until so many units of the run are stored."
    deadline = time.time() + 120
    while len(list(units.glob("*/units/*.json"))) < count and process.poll() is None and time.time() < deadline:
        time.sleep(.005)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_interrupted_killed_and_resumed(undisturbed, tmp_path):
    first = start(*TINY, "--out", tmp_path)
    # Python drops an interrupt that falls into a finalizer; if the run goes on, press Ctrl-C again
    for count in (1, 2, 3):
        wait_for(first, tmp_path / "agent", count)
        if first.poll() is None: first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=60)
    last = err.splitlines()[-1]
    assert (first.returncode, out) == (130, "") and "Traceback" not in err
    assert last.startswith("memory_notebook: stopped; ") and last.endswith("--resume") and f"--out {tmp_path}" in last

    second = start(*TINY, "--out", tmp_path, "--resume")
    wait_for(second, tmp_path / "agent", 4)
    time.sleep(.05)
    second.kill()
    second.communicate()
    assert second.returncode == -signal.SIGKILL and not list(tmp_path.glob("agent/*/result.json"))

    code, out, err = shell(*TINY, "--out", tmp_path, "--resume")
    assert code == 0 and err.count("done before") >= 4 and len(list((tmp_path / "agent").iterdir())) == 1
    assert scores(json.loads(out)) == scores(undisturbed[0])


def test_more_seeds_use_what_is_done(undisturbed, tmp_path):
    "`--seeds 2 --resume` after `--seeds 1` computes one seed, and says where each unit comes from."
    shutil.copytree(undisturbed[1], tmp_path / "agent" / undisturbed[1].name)
    command = ["2" if a == "1" else a for a in TINY]
    code, out, err = shell(*command, "--out", tmp_path, "--resume")
    assert code == 0 and err.count("seed0: done before") == 5 and "seed1: done before" not in err
    result = json.loads(out)
    assert result["seeds"] == [0, 1] and sum(len(g["units"]) for g in result["provenance"]) == 10
    assert result["metrics"]["naive.acc"]["values"][:1] == undisturbed[0]["metrics"]["naive.acc"]["values"]
    code, out, err = shell(*command, "--seed", 1, "--out", tmp_path, "--resume")
    assert json.loads(out)["seeds"] == [1, 2] and err.count("seed1: done before") == 5
    assert len(list((tmp_path / "agent").iterdir())) == 3  # no result was overwritten


def test_data(capsys):
    assert (
        experiments.main(["data", "digits", "--json"]) == 0 and json.loads(capsys.readouterr().out)[0]["here"] is True
    )


def test_chat_memory_remembers_in_another_process(tmp_path):
    command = [sys.executable, "-m", "memory_notebook.experiments", "chat-memory", str(tmp_path / "bank")]
    say = lambda *lines: subprocess.run(
        command,
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    first = say("learn Mira Dalwick plays the harp.", "quit")
    assert first.returncode == 0 and "stored" in first.stdout, first.stderr
    second = say("list", "ask Mira Dalwick plays the", "quit")
    assert second.returncode == 0 and "1 facts" in second.stdout and second.stdout.count("plays the harp") >= 2, (
        second.stdout
    )

"""A bank of facts: killed at every kind of moment, shared by two processes, fed hostile names and files, and walked."""
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from memory_notebook.language.bank import MemoryBank, NewFact, check_namespace

PROGRAM = '''
import os, signal, sys, time
import torch
from memory_notebook.language.bank import MemoryBank, NewFact

torch.set_num_threads(1)
folder, job, *args = sys.argv[1:]
die = lambda: os.kill(os.getpid(), signal.SIGKILL)

def fact(name, i):
    g = torch.Generator().manual_seed(i)
    key = torch.randn(6, generator=g)
    states = torch.randn(2, 6, generator=g)
    subject, city = f"{name}{i}", f"City{i}"
    return NewFact(f"{subject} lives in {city}.", key, states, [i, i + 1], [0, 1], subject, city, "{} lives in {}.")

bank = MemoryBank.open(folder, wait=60)
if job == "add":
    name, n = args[0], int(args[1])
    for i in range(n):
        bank.add(fact(name, i))
        if i % 7 == 6: bank.save()
        print(i, flush=True)
elif job == "half":  # a line of the journal is cut off in its middle
    fsync = os.fsync
    def cut(fd):
        fsync(fd)
        os.truncate(fd, os.fstat(fd).st_size - 40)
        die()
    os.fsync = cut
    bank.add(fact("Half", 0))
elif job == "save":  # die at the n-th file that gets its final name
    replace, count = os.replace, [0]
    def dying(a, b):
        count[0] += 1
        if count[0] == int(args[0]): die()
        replace(a, b)
        if count[0] == -int(args[0]): die()
    os.replace = dying
    bank.save()
'''


def start(folder: Path, *args: str) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), *args], stdout=subprocess.PIPE, text=True, env=env
    )


def fact(name: str, i: int) -> NewFact:
    g = torch.Generator().manual_seed(i)
    key = torch.randn(6, generator=g)
    states = torch.randn(2, 6, generator=g)
    return NewFact(
        f"{name}{i} lives in City{i}.", key, states, [i, i + 1], [0, 1], f"{name}{i}", f"City{i}", "{} lives in {}."
    )


def whole(bank: MemoryBank) -> None:
    "Every fact is complete: its text, its key, its entries."
    assert len(bank.keys) == len(bank) and len(bank.states) == 2 * len(bank)
    for f in bank.list():
        i = int(f.object.removeprefix("City"))
        new = fact(f.subject.removesuffix(str(i)), i)
        assert f.text == new.text and bank.marks[f.entries].tolist() == [[i, f.id, 0], [i + 1, f.id, 1]]
        torch.testing.assert_close(bank.keys.get([f.key])[0], new.key / new.key.norm())
        torch.testing.assert_close(bank.states.get(f.entries), new.entries / new.entries.norm(dim=1, keepdim=True))


def test_killed_at_any_moment_at_most_one_fact_is_lost(tmp_path):
    rng = random.Random(0)
    for attempt in range(3):
        process = start(tmp_path, "add", f"Kill{attempt}", "1000")
        said = []
        for line in process.stdout:
            said.append(int(line))
            if len(said) == rng.randint(9, 30) or len(said) > 30: break
        time.sleep(rng.random() / 50)
        process.kill()
        process.wait()
        bank = MemoryBank.load(tmp_path)
        whole(bank)
        kept = sum(f.subject.startswith(f"Kill{attempt}") for f in bank.list())
        assert kept >= len(said), "what was confirmed is there"
        again = MemoryBank.load(tmp_path)
        assert [f.id for f in again.list()] == [f.id for f in bank.list()]


def test_half_a_line_is_cut_off_and_nothing_else(tmp_path):
    bank = MemoryBank.open(tmp_path)
    bank.add(*(fact("A", i) for i in range(3)))
    process = start(tmp_path, "half")
    process.wait(60)
    assert process.returncode == -signal.SIGKILL
    journal = tmp_path / "memory_bank-0.journal"
    assert not journal.read_bytes().endswith(b"\n")
    bank = MemoryBank.open(tmp_path)
    assert len(bank) == 3
    whole(bank)
    bank.add(fact("B", 0))
    again = MemoryBank.load(tmp_path)
    assert len(again) == 4
    whole(again)


@pytest.mark.parametrize("moment", ["1", "2", "3", "-3"])
def test_killed_while_saving_the_bank_is_the_old_or_the_new(moment, tmp_path):
    bank = MemoryBank.open(tmp_path)
    bank.add(*(fact("A", i) for i in range(5)))
    bank.save()
    bank.add(*(fact("B", i) for i in range(4)))
    process = start(tmp_path, "save", moment)
    process.wait(60)
    assert process.returncode == -signal.SIGKILL
    again = MemoryBank.load(tmp_path)
    assert len(again) == 9
    whole(again)
    opened = MemoryBank.open(tmp_path)
    opened.add(fact("C", 0))
    opened.save()
    names = {p.name for p in tmp_path.iterdir() if p.suffix in (".json", ".safetensors", ".journal")}
    assert len(names) <= 4 and len(MemoryBank.load(tmp_path)) == 10, names


def test_two_processes_teach_one_bank(tmp_path):
    processes = [start(tmp_path, "add", name, "40") for name in ("Left", "Right")]
    for p in processes:
        p.communicate(timeout=120)
        assert p.returncode == 0
    bank = MemoryBank.load(tmp_path)
    whole(bank)
    assert len(bank) == 80 and len({f.id for f in bank.list()}) == 80


def test_a_lock_that_is_not_given_back_ends_in_one_line(tmp_path):
    bank = MemoryBank.open(tmp_path)
    with bank.disk.locked():
        with pytest.raises(TimeoutError, match="keeps .* locked"): MemoryBank.open(tmp_path, wait=0.1)


NAMES = ["../up", "a/b", "a\\b", "..", "", " ", "x" * 65, "a\nb", "a\0b", "${HOME}", "{0.__class__}", "CON\t", None, 7]


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_name_is_refused_and_writes_nothing(name, tmp_path):
    with pytest.raises(ValueError, match="no name of a persona"): check_namespace(name)
    bank = MemoryBank.open(tmp_path)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="no name of a persona"): bank.add(fact("A", 0)._replace(namespace=name))
    assert len(bank) == 0 and sorted(p.name for p in tmp_path.rglob("*")) == before


TEXTS = [
    "../../etc/passwd", "{0.__class__.__mro__}", "'; DROP TABLE keys; --", "__import__('os').system('x')",
    "<|endoftext|>", "\x1b[2J\x07", "a\nb\r\n{\"drop\": 0}\n",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_hostile_text_is_only_a_text(text, tmp_path):
    bank = MemoryBank.open(tmp_path)
    new = fact("A", 0)._replace(text=text, subject=text.strip(), object=text.strip())
    assert bank.add(new)[0].stored
    assert MemoryBank.load(tmp_path)[0].text == text
    bank.save()
    again = MemoryBank.load(tmp_path)
    assert again[0].text == text and again.about([text.strip()]) == [0]
    assert {p.name.split("-")[0].split(".")[0] for p in tmp_path.iterdir()} <= {"memory_bank", ""} and not list(
        tmp_path.parent.glob("*.txt")
    )


def damage(tmp_path: Path, how: str) -> None:
    pointer = json.loads((tmp_path / "memory_bank.json").read_text())
    data, table = (tmp_path / pointer["files"][k]["name"] for k in ("safetensors", "json"))
    if how == "bit":
        raw = bytearray(data.read_bytes())
        raw[-5] ^= 1
        data.write_bytes(raw)
    if how == "text": table.write_text(table.read_text().replace("City1", "City9"))
    if how == "gone": data.unlink()
    if how == "path": pointer["files"]["json"]["name"] = "../../secret.json"
    if how == "version": pointer["format"] = 99
    if how in ("path", "version"): (tmp_path / "memory_bank.json").write_text(json.dumps(pointer))
    if how == "pointer": (tmp_path / "memory_bank.json").write_text("{")
    if how == "journal": (tmp_path / "memory_bank-1.journal").write_bytes(b"00000000 {\"drop\": 0}\n")


@pytest.mark.parametrize("how", ["bit", "text", "gone", "path", "version", "pointer", "journal"])
def test_a_damaged_bank_is_never_half_a_bank(how, tmp_path):
    bank = MemoryBank.open(tmp_path)
    bank.add(*(fact("A", i) for i in range(3)))
    bank.save()
    damage(tmp_path, how)
    with pytest.raises(ValueError, match="damaged|checksum|none of a bank's|format 99"): MemoryBank.load(tmp_path)


def test_what_was_forgotten_is_off_the_disk_after_a_save(tmp_path):
    bank = MemoryBank.open(tmp_path)
    bank.add(fact("Secret", 0), fact("A", 1))
    bank.save()
    bank.forget(0)
    bank.save()
    assert not any(b"Secret" in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


def test_the_walk_of_a_fact_is_the_one_that_the_chapter_tells(tmp_path):
    from memory_notebook import ContinualLearningGPT2
    book = json.loads((Path(__file__).parents[1] / "nbs/09c_bank.ipynb").read_text(encoding="utf-8"))
    told = next("".join(c["source"]) for c in book["cells"] if "## The walk of a fact" in "".join(c["source"]))
    steps = re.findall(r"`(\w+)`", told)
    model = ContinualLearningGPT2.from_pretrained().eval()
    model.bank = MemoryBank.open(tmp_path)
    calls = []  # of functions of the package, in their order

    def watch(frame, event, arg):
        if event == "call" and "memory_notebook" in Path(frame.f_code.co_filename).parts:
            calls.append(frame.f_code.co_name)

    sys.setprofile(watch)
    try: decision = model.learn_from_example("Mira Talvenor lives in Port Hask.")
    finally: sys.setprofile(None)
    assert decision.stored and len(MemoryBank.load(tmp_path)) == 1
    assert 5 < len(steps) <= 10
    rest = iter(calls)
    for step in steps: assert step in rest, f"{step} is not called, or not after the step before it"

#!/usr/bin/env python3
"""Run every chapter, then every test, on all cores, and count both: what `make test` does, with the Python of .venv.

    .ci/test.py          all chapters and tests; what needs a data set that is not here is skipped, and says so
    .ci/test.py --data   only what needs a network the first time: real data sets, and the tests in a browser

nbdev_test counts nothing and is content with nothing, so what it completes is held against the notebooks on disk.
"""
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
ASKS_FOR_DATA = re.compile(r"\b(available|needs)\(")  # how a chapter asks whether a data set is here


def chapters(only_data: bool) -> list[Path]:
    "The notebooks of the book, or those of them that ask for real data."
    found = [p for p in sorted((ROOT / "nbs").glob("*.ipynb")) if p.name[0] not in "_."]
    if not only_data: return found
    cells = lambda p: json.loads(p.read_text(encoding="utf-8"))["cells"]
    asks = lambda p: any(c["cell_type"] == "code" and ASKS_FOR_DATA.search("".join(c["source"])) for c in cells(p))
    return [p for p in found if asks(p)]


def run_notebooks(want: list[Path], seconds: dict[str, float]) -> list[str]:
    "Run nbdev_test and show its lines as they come. Returns the names of the notebooks that did not pass."
    names = {p.name for p in want}
    pattern = "(" + "|".join(re.escape(p.name) for p in want) + ")$"
    command = [BIN / "nbdev_test", "--do_print", "--file_re", pattern, "--n_workers", str(CORES)]
    # A group of its own: nbdev_test would wait for all its workers after Ctrl-C, so they are ended here.
    child = subprocess.Popen(
        command,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    lines = []
    began = {}
    try:
        for line in child.stdout:
            print(line, end="", flush=True)
            lines.append(line)
            if m := re.match(r"Starting .*?([^/\\]+\.ipynb)", line): began[m[1]] = time.perf_counter()
            if m := re.match(r"- Completed .*?([^/\\]+\.ipynb)", line):
                seconds[m[1]] = time.perf_counter() - began.get(m[1], time.perf_counter())
        broken = child.wait() != 0
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        raise
    listed = re.search(r"Failed On The Following Notebooks:\n=+\n((?:\t.+\n?)+)", "".join(lines))
    wrong = set(listed[1].split()) if listed else set()
    bad = sorted(names - (seconds.keys() - wrong))
    return bad or (["nbdev_test itself"] if broken else [])


def run_tests(arguments: list[str], seconds: dict[str, float]) -> tuple[int, int, int]:
    "Run pytest on all cores. Returns how many tests passed, failed and were skipped."
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "tests", "-n", str(CORES), "--dist", "loadscope", *arguments]
        code = subprocess.run([*command, f"--junitxml={report}"], stdin=subprocess.DEVNULL).returncode
        suite = ElementTree.parse(report).getroot().find("testsuite") if report.exists() else None
    if suite is None: return 0, 1, 0
    for case in suite.iter("testcase"):
        seconds[f"{case.get('classname')}::{case.get('name')}"] = float(case.get("time", 0))
    found, failures, errors, skipped = (int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped"))
    nothing_chosen = code == 5 and not found
    return found - skipped - failures - errors, max(failures + errors, int(code != 0 and not nothing_chosen)), skipped


def main(arguments: list[str]) -> bool:
    if set(arguments) - {"--data"}: sys.exit(__doc__)
    os.chdir(ROOT)
    # One notebook or test, one core; lines appear when they are printed.
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    for s in (signal.SIGTERM, signal.SIGHUP): signal.signal(s, lambda s, _: sys.exit(128 + s))
    only_data = bool(arguments)
    start = time.perf_counter()
    seconds: dict[str, float] = {}
    want = chapters(only_data)
    bad = run_notebooks(want, seconds)
    passed, failed, skipped = run_tests(["-m", "(data or browser) and not lab"] if only_data else [], seconds)
    print("\nthe ten slowest:")
    for name, spent in sorted(seconds.items(), key=lambda item: -item[1])[:10]: print(f"{spent:7.1f} s  {name}")
    print(f"\n{len(want)} notebooks and {passed + failed} tests ran on {CORES} cores, {skipped} tests were skipped, "
          f"{(time.perf_counter() - start) / 60:.1f} minutes")
    if bad: print("notebooks to mend: " + ", ".join(bad))
    failed += len(bad) or int(not want)
    passed += sum(p.name not in bad for p in want)
    print(f"total: {passed} passed, {failed} failed", flush=True)
    return bool(failed)


if __name__ == "__main__":
    try: sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt: sys.exit("\nstopped")

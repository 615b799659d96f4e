#!/usr/bin/env python3
"""Run every chapter, then every test, and count both: what `make test` does, with the Python of .venv.

nbdev_test counts nothing and is content with nothing, so what it completes is held against the notebooks on disk.
"""
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def run_notebooks():
    "Run nbdev_test, show its lines as they come. Returns how many ran, passed and failed, and which failed."
    want = {
        p.name for p in ROOT.glob("nbs/**/*.ipynb") if not any(part[0] in "_." for part in p.relative_to(ROOT).parts)
    }
    lines = []
    # A group of its own: nbdev_test would wait for all its workers after Ctrl-C, so they are ended here.
    child = subprocess.Popen(
        [BIN / "nbdev_test", "--do_print"],
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        for line in child.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        broken = child.wait() != 0
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        raise
    out = "".join(lines)
    done = {Path(p).name for p in re.findall(r"- Completed (.+?\.ipynb)", out)}
    listed = re.search(r"Failed On The Following Notebooks:\n=+\n((?:\t.+\n?)+)", out)
    wrong = set(listed[1].split()) if listed else set()
    bad = sorted(want - (done - wrong))
    return len(want & done), len(want) - len(bad), max(len(bad), int(broken or not want)), bad


def run_tests():
    "Run pytest. Returns how many tests ran, passed, failed and were skipped."
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = subprocess.run(
            [sys.executable, "-m", "pytest", "tests", f"--junitxml={report}"], stdin=subprocess.DEVNULL
        ).returncode
        suite = ElementTree.parse(report).getroot().find("testsuite").attrib if report.exists() else {}
    found, failures, errors, skipped = (int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped"))
    return found - skipped, found - skipped - failures - errors, max(failures + errors, int(code != 0)), skipped


def main():
    os.chdir(ROOT)
    # one notebook or test, one core; lines appear when they are printed
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    for s in (signal.SIGTERM, signal.SIGHUP): signal.signal(s, lambda s, _: sys.exit(128 + s))
    notebooks, *nb_counts, bad = run_notebooks()
    tests, *test_counts, skipped = run_tests()
    passed, failed = map(sum, zip(nb_counts, test_counts))
    print(f"\n{notebooks} notebooks and {tests} tests ran, {skipped} tests were skipped")
    if bad: print("notebooks to mend: " + ", ".join(bad))
    print(f"total: {passed} passed, {failed} failed", flush=True)
    return bool(failed)


if __name__ == "__main__":
    try: sys.exit(main())
    except KeyboardInterrupt: sys.exit("\nstopped")

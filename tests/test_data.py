"""Downloads, crashes and folders that cannot be written: what the chapter `00a_data` cannot test within itself."""
import gzip
import hashlib
import http.server
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from memory_notebook import corpora, data
from memory_notebook.data import DataError, DataSet, Source, fetch

CONTENT = bytes(range(256)) * 2000
PACKED = gzip.compress(CONTENT, mtime=0)
SHA = "sha256:" + hashlib.sha256(PACKED).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    "Serves /good, /other (wrong content), /short (closes early) and /slow (stops in the middle)"
    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path == "/gone": return self.send_error(404)
        body = {"/other": b"<html>not the file</html>"}.get(self.path, PACKED)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path in ("/short", "/slow"): body = body[:len(body) // 2]
        self.wfile.write(body)
        self.wfile.flush()
        if self.path == "/slow":
            self.server.halfway.set()
            self.server.let_go.wait(20)

    def log_message(self, *a): pass


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    "The servers below run on this machine: a proxy of the user's, also one that leads nowhere, is not asked."
    for name in [n for n in os.environ if n.lower().endswith("_proxy")]: monkeypatch.delenv(name)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server():
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    s.asked = []
    s.halfway = threading.Event()
    s.let_go = threading.Event()
    s.daemon_threads = True
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield s
    s.let_go.set()
    s.shutdown()
    s.server_close()


@pytest.fixture
def demo(server, monkeypatch):
    "demo(paths…) declares a data set with one file and these mirrors"
    monkeypatch.delenv("MEMORY_NOTEBOOK_DATA", raising=False)
    def declare(*paths, hashes=(SHA,)):
        urls = tuple(f"http://127.0.0.1:{server.server_port}{p}" for p in paths)
        monkeypatch.setitem(
            data.DATASETS,
            "demo",
            DataSet("a test", "none", "nobody", 0, {"file": Source("demo/file.gz", urls, hashes)}),
        )
    return declare


def files(folder): return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


def one_line(error):
    assert "\n" not in str(error.value) and len(str(error.value)) < 2500
    return str(error.value)


def test_download_then_no_network(demo, server, tmp_path):
    demo("/good")
    assert fetch("demo", "file", tmp_path) == CONTENT
    assert fetch("demo", "file", tmp_path) == CONTENT
    assert server.asked == ["/good"] and files(tmp_path) == ["demo/file.gz"]


@pytest.mark.parametrize("bad", ["/gone", "/other", "/short"])
def test_next_mirror(demo, server, tmp_path, bad):
    demo(bad, "/good")
    assert fetch("demo", "file", tmp_path) == CONTENT
    assert server.asked == [bad, "/good"] and files(tmp_path) == ["demo/file.gz"]


@pytest.mark.parametrize("bad", ["/gone", "/other", "/short"])
def test_no_mirror_left(demo, tmp_path, bad):
    demo(bad)
    with pytest.raises(DataError) as e: fetch("demo", "file", tmp_path)
    message = one_line(e)
    assert "demo/file.gz" in message and bad in message and "MEMORY_NOTEBOOK_DATA" in message
    if bad == "/other": assert SHA.split(":")[1] in message
    assert files(tmp_path) == []


def test_half_an_archive_without_known_hash(demo, tmp_path):
    demo("/short", hashes=())
    with pytest.raises(DataError): fetch("demo", "file", tmp_path)
    assert files(tmp_path) == []


def test_local_copy_never_asks_the_network(demo, server, tmp_path, monkeypatch):
    demo("/good")
    monkeypatch.setenv("MEMORY_NOTEBOOK_DATA", str(tmp_path))
    with pytest.raises(DataError) as e: fetch("demo", "file")
    message = one_line(e)
    assert str(tmp_path / "demo" / "file.gz") in message and SHA in message and "unset MEMORY_NOTEBOOK_DATA" in message
    (tmp_path / "demo").mkdir()
    for name, raw in (("file", CONTENT), ("file.gz", PACKED)):
        monkeypatch.setitem(
            data.DATASETS["demo"].files,
            "file",
            Source("demo/file.gz", (), (SHA, "sha256:" + hashlib.sha256(CONTENT).hexdigest())),
        )
        (tmp_path / "demo" / name).write_bytes(raw)
        assert fetch("demo", "file") == CONTENT
        (tmp_path / "demo" / name).unlink()
    assert server.asked == []


def test_root_goes_before_the_environment(demo, tmp_path, monkeypatch):
    demo("/good")
    monkeypatch.setenv("MEMORY_NOTEBOOK_DATA", "/nowhere")
    assert fetch("demo", "file", tmp_path) == CONTENT


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_kill_in_the_middle_of_a_download(demo, server, tmp_path):
    url = f"http://127.0.0.1:{server.server_port}/slow"
    code = (
        f"from memory_notebook import data as d; d.DATASETS['demo'] = d.DataSet('', '', '', 0, {{'file': "
        f"d.Source('demo/file.gz', ({url!r},), "
        f"({SHA!r},))}}); d.fetch('demo', 'file', {str(tmp_path)!r})"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    assert server.halfway.wait(60)
    time.sleep(.3)
    child.kill()
    child.wait()
    assert "demo/file.gz" not in files(tmp_path)
    demo("/good")
    assert fetch("demo", "file", tmp_path) == CONTENT


def test_cache_below_a_file(demo, tmp_path):
    demo("/good")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError) as e: fetch("demo", "file", tmp_path / "file")
    assert one_line(e).startswith(f"cannot write {tmp_path}") and "root=" in str(e.value)


def test_read_only_cache(demo, server):
    demo("/good")
    folder = tempfile.mkdtemp()  # tmp_path lies in a folder that only its owner may enter
    os.chmod(folder, 0o555)
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if root: os.seteuid(65534)  # root may write everywhere, nobody may not
    try:
        with pytest.raises(DataError) as e: fetch("demo", "file", folder)
    finally:
        if root: os.seteuid(0)
        os.chmod(folder, 0o755)
        shutil.rmtree(folder)
    assert one_line(e).startswith(f"cannot write {folder}") and "PermissionError" in str(e.value) and server.asked == []


def test_made_files_survive_a_read_only_cache(tmp_path):
    import torch
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(UserWarning, match="cannot keep .* pass root="):
        x = data._cached("abc", lambda: torch.ones(3, dtype=torch.uint8), tmp_path / "file")
    assert x.tolist() == [1, 1, 1]


def test_web_page_in_place_of_babi(tmp_path):
    place = tmp_path / "babi" / "tasks_1-20_v1-2.tar.gz"
    place.parent.mkdir()
    place.write_text("<html>moved</html>")
    with pytest.raises(DataError) as e: corpora.load_babi(1, root=tmp_path)
    assert str(place) in one_line(e) and "no whole zip or tar" in str(e.value)


def cut(raw: bytes) -> bytes: return raw[:len(raw) // 2]


def flipped(raw: bytes) -> bytes: return raw[:99] + bytes([raw[99] ^ 1]) + raw[100:]


def need(name: str) -> None:
    if not data.available(name, quiet=True): pytest.skip(data.how_to_fetch(name))


@pytest.mark.data
@pytest.mark.parametrize("name, file, load", [
    ("mnist", "train-images-idx3-ubyte.gz", data.load_mnist),
    ("omniglot", "images_background.zip", data.load_omniglot),
    ("babi", "en", corpora.load_babi),
    ("nations", "test.txt", corpora.load_graph),
    ("wikitext-2", "valid.txt", corpora.load_wikitext2),
    ("tinyshakespeare", "input.txt", corpora.load_shakespeare),
    ("timeseries", "sunspots.csv", corpora.load_series),
])
@pytest.mark.parametrize("damage", [cut, flipped])
def test_damaged_local_file(name, file, load, damage, tmp_path, monkeypatch):
    need(name)
    original = data._find(data.DATASETS[name].files[file])
    home = data.data_home()
    shutil.copytree(home / name, tmp_path / name, copy_function=lambda a, b: os.symlink(a, b))
    copy = tmp_path / original.relative_to(home)
    tmp_path.joinpath(name).chmod(0o755)
    copy.unlink()
    copy.write_bytes(damage(original.read_bytes()))
    monkeypatch.setenv("MEMORY_NOTEBOOK_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataError) as e: load()
    assert str(copy) in one_line(e) and "expected" in str(e.value) and "Delete it and run again" in str(e.value)


@pytest.mark.data
def test_omniglot_without_a_writable_cache(tmp_path, monkeypatch):
    need("omniglot")
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot keep"):
        part = data._characters("evaluation", 20, data.torch.uint8, None)
    assert part.images.shape == (659, 20, 20, 20)

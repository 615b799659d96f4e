"""What a reader meets in a real browser: saved widgets without a kernel, and a chapter that runs in JupyterLab.

Needs Chromium, playwright and npm, and the npm registry the first time (the packages are then kept in
.pytest_cache); skipped without them.
Deselect with `pytest -m "not browser"`.
"""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parents[1]
CHAPTER = ROOT / "nbs/00d_live.ipynb"
STATE, VIEW = (f"application/vnd.jupyter.widget-{kind}+json" for kind in ("state", "view"))
PACKAGES = {"requirejs": "requirejs@2.3.6", "jquery": "jquery@3.5.1", "anywidget": "anywidget@0.11.0",
            "@jupyter-widgets/html-manager": "@jupyter-widgets/html-manager@1.0.14"}
WAIT = 120_000  # ms; a slow machine is no failure

# ---------------------------------------------------------------- tools


@pytest.fixture(scope="module")
def browser():
    "A headless Chromium."
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    quiet = ("--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
             "--disable-sync")
    with sync_api.sync_playwright() as p:
        path = found or p.chromium.executable_path
        if not os.path.exists(path): pytest.skip("no Chromium: install it, or run `playwright install chromium`")
        chromium = p.chromium.launch(executable_path=path, args=quiet.split())
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def cdn(request):
    "The files that a docs page loads from a CDN, out of npm packages: name/path -> bytes."
    folder = request.config.cache.mkdir("npm")
    files = {}
    for name, spec in PACKAGES.items():
        archive = folder / (spec.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz")  # as npm names it
        if not archive.exists():
            if not shutil.which("npm"): pytest.skip("npm is not installed")
            try:
                command = ["npm", "pack", "--silent", "--fetch-retries=0", spec]
                subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)
            except (subprocess.SubprocessError, OSError): pytest.skip(f"npm cannot fetch {spec}: no network?")
        with tarfile.open(archive) as tar:
            files |= {f"{name}/{m.name.partition('/')[2]}": tar.extractfile(m).read() for m in tar if m.isfile()}
    return files


def docs_page(nb: dict) -> str:
    "The widgets of a notebook in a page like those that Quarto makes: state, views, and the same scripts."
    script = lambda kind, data: f'<script type="{kind}">{json.dumps(data).replace("<", chr(92) + "u003c")}</script>'
    views = [o["data"][VIEW] for c in nb["cells"] for o in c.get("outputs", []) if VIEW in o.get("data", {})]
    return f"""<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>widgets</title>
    <script data-jupyter-widgets-cdn="https://cdn.jsdelivr.net/npm/" data-jupyter-widgets-cdn-only></script>
    <script src="https://cdnjs.cloudflare.com/ajax/libs/require.js/2.3.6/require.min.js"></script>
    <script src="https://cdnjs.cloudflare.com/ajax/libs/jquery/3.5.1/jquery.min.js"></script>
    <script>define("jquery", [], () => window.jQuery)</script>
    <script src="https://cdn.jsdelivr.net/npm/@jupyter-widgets/html-manager@*/dist/embed-amd.js"></script></head><body>
    {script(STATE, nb["metadata"]["widgets"][STATE])}
    {"".join(f'<div id="view{i}">{script(VIEW, view)}</div>' for i, view in enumerate(views))}</body></html>"""


def open_static(browser, cdn, nb: dict):
    "Open a docs page with no kernel and no network behind it: what the CDN would serve comes from the npm packages."
    page = browser.new_page(viewport={"width": 800, "height": 900})
    errors = []

    def serve(route):
        url = route.request.url
        if url == "http://docs.test/": return route.fulfill(body=docs_page(nb), content_type="text/html")
        if "require.min.js" in url: file = "requirejs/require.js"
        elif "jquery.min.js" in url: file = "jquery/dist/jquery.min.js"
        else: file = re.sub(r"^https://cdn\.jsdelivr\.net/npm/((?:@[^/]+/)?[^@/]+)(?:@[^/]+)?/", r"\1/", url)
        if file not in cdn and f"{file}.js" in cdn: file += ".js"
        if file not in cdn: return route.abort()  # fonts
        route.fulfill(body=cdn[file], content_type="text/javascript", headers={"access-control-allow-origin": "*"})

    page.set_default_timeout(WAIT)
    page.route("**/*", serve)
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.goto("http://docs.test/")
    return page, errors


def wait_alt(page, view: str, start: str) -> None:
    "Wait until the one visible image of a view has an alternative text that starts like this."
    page.wait_for_function("""([view, start]) => {
        const seen = [...document.querySelectorAll(view + ' img')].filter(i => i.offsetParent && i.naturalWidth);
        return seen.length == 1 && seen[0].alt.startsWith(start) }""", arg=[view, start])


def run_cells(*sources: str) -> dict:
    "A notebook with these cells, run, its widget state saved."
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    nbclient.NotebookClient(nb, timeout=WAIT / 1000, kernel_name="python3", store_widget_state=True).execute()
    return nb


# ---------------------------------------------------------------- without a kernel


def test_static_view_answers_without_a_kernel(browser, cdn):
    "The static view follows the keyboard, the mouse and the Play button; the live view keeps its note and does not."
    page, errors = open_static(browser, cdn, json.loads(CHAPTER.read_text(encoding="utf-8")))
    live = "#view0"
    static = "#view1"
    wait_alt(page, static, "Strength 1, exponent 1:")
    strength, gamma = page.locator(f"{static} [role=slider]").all()

    strength.focus()
    page.keyboard.press("ArrowRight")
    wait_alt(page, static, "Strength 5, exponent 1:")
    gamma.focus()
    page.keyboard.press("End")
    wait_alt(page, static, "Strength 5, exponent 4:")  # the other control keeps its place

    strength.hover()
    page.mouse.down()
    track = page.locator(f"{static} .noUi-target").first.bounding_box()
    page.mouse.move(track["x"] + track["width"], track["y"], steps=8)
    page.mouse.up()
    wait_alt(page, static, "Strength 60, exponent 4:")

    strength.focus()
    page.keyboard.press("Home")
    wait_alt(page, static, "Strength 1, exponent 4:")  # nothing has played by itself
    page.locator(f"{static} button").first.click()
    wait_alt(page, static, "Strength 60, exponent 4:")
    for label in ("strength β", "sharpening γ", "Play through strength β:"):
        assert page.locator(static).get_by_text(label, exact=True).is_visible()

    slider = page.locator(f"{live} [role=slider]").first
    slider.focus()
    page.keyboard.press("End")
    assert slider.get_attribute("aria-valuenow") == "60.0"
    wait_alt(page, live, "Strength 20, exponent 2:")
    assert page.get_by_text("This view needs a kernel").is_visible()
    assert not errors


def test_buttons_and_anywidget_answer_without_a_kernel(browser, cdn):
    "The other two rows of the chapter's table: ToggleButtons over a Stack, and an anywidget that draws for itself."
    nb = run_cells("from memory_notebook.live import static", "import anywidget, ipywidgets, traitlets",
                   "static(lambda kind: f'<p>page {kind}</p>', kind=['one', 'two'])", '''
class Square(anywidget.AnyWidget):
    _esm = """export default {render({model, el}) {
        const draw = () => el.textContent = "square " + model.get("table")[model.get("n")];
        draw(); model.on("change:n", draw)}}"""
    n = traitlets.Int(0).tag(sync=True)
    table = traitlets.List([0, 1, 4, 9]).tag(sync=True)
slider, square = ipywidgets.IntSlider(max=3, description="n"), Square()
ipywidgets.jslink((slider, "value"), (square, "n"))
ipywidgets.VBox([slider, square])''')
    page, errors = open_static(browser, cdn, nb)
    page.get_by_text("page one").wait_for()
    assert not page.get_by_text("page two").is_visible()
    page.get_by_role("button", name="two").click()
    page.get_by_text("page two").wait_for()
    assert not page.get_by_text("page one").is_visible()
    page.get_by_text("square 0").wait_for()
    page.locator("#view1 [role=slider]").focus()
    page.keyboard.press("End")
    page.get_by_text("square 9").wait_for()
    assert not errors


def saved_views():
    "The chapters that show widgets."
    shows = lambda nb: any(VIEW in o.get("data", {}) for c in nb["cells"] for o in c.get("outputs", []))
    return [p for p in sorted(ROOT.glob("nbs/*.ipynb")) if shows(json.loads(p.read_text(encoding="utf-8")))]


@pytest.mark.parametrize("path", saved_views(), ids=lambda p: p.stem)
def test_saved_widgets_are_drawn(browser, cdn, path):
    "Every widget of a chapter can be built from what was saved; every image in it has loaded and has a text."
    page, errors = open_static(browser, cdn, json.loads(path.read_text(encoding="utf-8")))
    for view in page.locator("[id^=view]").all(): view.locator(".jupyter-widgets").first.wait_for()
    page.wait_for_function(
        "() => [...document.images].filter(i => i.offsetParent).every(i => i.complete && i.naturalWidth && i.alt)"
    )
    assert not errors


# ---------------------------------------------------------------- with a kernel


@pytest.fixture
def lab(tmp_path):
    "JupyterLab on a free port, in an empty folder with its own settings. Yields its folder and address."
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    (home := tmp_path / "home").mkdir()
    (work := tmp_path / "work").mkdir()
    env = os.environ | {
        "IN_TEST": "1",
        "OMP_NUM_THREADS": "1",
        "JUPYTER_CONFIG_DIR": str(home),
        "JUPYTER_DATA_DIR": str(home),
        "JUPYTER_RUNTIME_DIR": str(home),
        "JUPYTERLAB_SETTINGS_DIR": str(home),
        "JUPYTERLAB_WORKSPACES_DIR": str(home),
        # IN_TEST: the last cell of a chapter does not export
        "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": str(home),
    }
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "IdentityProvider.token": "test",
        "ServerApp.root_dir": work,
        "ServerApp.open_browser": False,
        "ServerApp.allow_root": True,
        "LabApp.expose_app_in_browser": True,
    }
    with open(tmp_path / "lab.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *(f"--{k}={v}" for k, v in options.items())],
            cwd=work,
            env=env,
            stdout=log,
            stderr=log,
        )
    address = f"http://127.0.0.1:{port}"
    end = time.monotonic() + WAIT / 1000
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/api?token=test", timeout=5)
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < end, (tmp_path / "lab.log").read_text()[-2000:]
                time.sleep(.2)
        yield work, address
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()


def run_all(page, address: str, name: str) -> list[dict]:
    "Open a notebook in JupyterLab and choose Run All. Returns its cells, of which none has failed."
    page.set_default_timeout(WAIT)
    page.goto(f"{address}/lab/tree/{name}?token=test")
    page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.context?.isReady"
                           " && window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status == 'idle'")
    ran = page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
    cells = page.evaluate("() => window.jupyterapp.shell.currentWidget.content.model.toJSON().cells")
    code = [c for c in cells if c["cell_type"] == "code"]
    failed = [o for c in code for o in c["outputs"] if o["output_type"] == "error"]
    assert ran and not failed and all(c["execution_count"] for c in code), failed
    return cells


@pytest.mark.lab
@pytest.mark.parametrize("chapter", sorted((ROOT / "nbs").glob("[0-9]*.ipynb")), ids=lambda p: p.stem)
def test_every_chapter_runs_whole(browser, lab, chapter, record_property):
    "Run All, as a reader does it: no flag skips a cell. Takes half an hour for the book: `pytest -m lab`."
    work, address = lab
    shutil.copytree(ROOT / "nbs", work, dirs_exist_ok=True)
    start = time.monotonic()
    run_all(browser.new_page(), address, chapter.name)
    record_property("seconds", round(time.monotonic() - start, 1))


def test_chapter_runs_in_jupyterlab(browser, lab, tmp_path):
    "Run All shows no error; then both views follow the keyboard, the live one through the kernel."
    work, address = lab
    shutil.copy(CHAPTER, work)
    page = browser.new_page(viewport={"width": 1100, "height": 1000})
    cells = run_all(page, address, CHAPTER.name)
    assert not [c for c in cells if c["cell_type"] == "code" and any(o.get("name") == "stderr" for o in c["outputs"])]

    live, static = [i for i, c in enumerate(cells) if any(VIEW in o.get("data", {}) for o in c.get("outputs", []))]
    for i, before, after in ((live, "Strength 20, exponent 2:", "Strength 21, exponent 2:"),
                             (static, "Strength 1, exponent 1:", "Strength 5, exponent 1:")):
        page.evaluate("""i => { const book = window.jupyterapp.shell.currentWidget.content;
                         book.activeCellIndex = i; return book.scrollToItem(i) }""", i)
        cell = f".jp-Cell[data-windowed-list-index='{i}']"
        wait_alt(page, cell, before)
        if i == live: page.locator(cell).get_by_text("This view needs a kernel").wait_for(state="hidden", timeout=WAIT)
        page.locator(f"{cell} [role=slider]").first.focus()
        page.keyboard.press("ArrowRight")
        wait_alt(page, cell, after)
        page.screenshot(path=tmp_path / f"cell{i}.png")

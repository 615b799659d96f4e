#!/usr/bin/env python3
"""Process the chapters for the docs site, as `nbdev_docs` does before Quarto, and check what came out. Needs no Quarto.

    .ci/docs.py            write _proc/, check every page and README.md
    .ci/docs.py --readme   write README.md from nbs/index.ipynb
    .ci/docs.py --check    only check that README.md is what nbs/index.ipynb makes
"""
import ast
import json
import os
import re
import sys
import warnings
from pathlib import Path

import yaml

os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}  # for the workers
ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
PROC = ROOT / "_proc"
README = ROOT / "README.md"
INDEX = ROOT / "nbs/index.ipynb"
STATE, VIEW = (f"application/vnd.jupyter.widget-{kind}+json" for kind in ("state", "view"))
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")  # image?, text, target

text = lambda source: source if isinstance(source, str) else "".join(source)
read = lambda path: json.loads(Path(path).read_text(encoding="utf-8"))
slug = lambda stem: re.sub(r"^\d+[a-zA-Z0-9]*_", "", stem.lower())  # 00a_data -> data, as nbdev names modules and pages
widgets = lambda nb: nb["metadata"].get("widgets", {}).get(STATE, {}).get("state", {})
outputs = lambda nb, kind: [(c, text(o["data"][kind]) if kind != VIEW else o["data"][kind])
                            for c in nb["cells"] for o in c.get("outputs", []) if kind in o.get("data", {})]
name = lambda cell: f"cell {cell['id']} ({re.sub(r'(?m)^#[|].*', '', text(cell['source'])).strip()[:50]!r})"


def links(markdown):
    "The links outside of code and formulas; code that is itself the text of a link is one."
    for inside in (r"(?s)```.*?```", r"(?s)\$\$.*?\$\$", r"(?<!\[)(`+)[^`]+\1(?!\])", r"\$[^$\n]+\$"):
        markdown = re.sub(inside, "", markdown)
    return LINK.findall(markdown)


def check_source(nb, bad):
    "Cells that the docs build would run again, alone, because they hold an import; outputs that are errors."
    for c in nb["cells"]:
        s = text(c["source"])
        if any(o["output_type"] == "error" for o in c.get("outputs", [])): bad(f"{name(c)} shows an error")
        said = "".join(text(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in c.get("outputs", []))
        if re.search(r"%\|.*\[\d\d:\d\d<", said):
            bad(f"{name(c)} keeps a progress bar: TQDM_DISABLE=1 jupyter execute --inplace nbs/...")
        if c["cell_type"] != "code" or re.match(r"(#\|.*\n)*#\|\s*(export|eval)", s) or "nbdev_export()" in s: continue
        kinds = {type(node) for node in ast.walk(ast.parse(re.sub(r"(?m)^[%!].*", "", s)))}
        if kinds & {ast.Import, ast.ImportFrom} and kinds & {ast.Expr, ast.Assign}:
            bad(f"{name(c)} mixes an import with other code")


def check_figures(nb, bad):
    "Every figure, and every image in HTML or in a widget, says what it shows. Returns how many there are."
    html = [m["state"].get("value") for m in widgets(nb).values()] + [h for _, h in outputs(nb, "text/html")]
    tags = [tag for h in html if isinstance(h, str) for tag in re.findall(r"<img\b[^>]*>", h)]
    for tag in tags:
        if not re.search(r'\balt="[^"]+"', tag): bad(f"an image has no alternative text: {tag[:60]}")
    figures = [c for kind in ("image/png", "image/svg+xml", "image/jpeg") for c, _ in outputs(nb, kind)]
    for c in figures:
        head = re.findall(r"(?m)^#\|(.*)", re.match(r"(#\|.*\n?)*", text(c["source"]))[0])
        try: said = yaml.safe_load("\n".join(h for h in head if "fig-alt:" in h))
        except yaml.YAMLError: bad(f"{name(c)}: quote the fig-alt, it holds a colon or another sign of YAML")
        else:
            if not said: bad(f"{name(c)} draws a figure without #| fig-alt")
    return len(tags) + len(figures)


def check_page(path, source, symbols, places, bad):
    "One processed chapter: what it exports is documented, links lead somewhere, widgets are kept. Returns counts."
    page = read(path)
    host = places["host"]
    shown = {
        m[1]: md
        for c, md in outputs(page, "text/markdown")
        if (m := re.search(r"(?m)^show_doc\(([\w.]+)", text(c["source"])))
    }
    for s in symbols:
        if f"### {s}\n" not in shown.get(s, ""): bad(f"{s} is exported but not documented on its page")
        elif "[source](" not in shown[s]:
            bad(f"{s} has no link to its source: is the entry point group nbdev installed?")
    found = [link for c in page["cells"] if c["cell_type"] == "markdown" for link in links(text(c["source"]))]
    for image, label, target in found:
        url, _, anchor = target.partition("#")
        inside = url.startswith(host) and (url[len(host) + 1:], anchor) in places["anchors"]
        outside = re.match(r"[a-z]+:", url) and not url.startswith(host)
        known = not url or url in places["pages"] or (path.parent / url).exists()
        if not (inside or outside or known): bad(f"the link to {target} leads nowhere")
        if image and not label: bad(f"the image {target} has no alternative text")
    state = widgets(source)
    kept = widgets(page)
    if lost := [k for k in state if state[k] != kept.get(k)]:
        bad(f"{len(lost)} of {len(state)} saved widgets were lost or changed")
    for c, view in outputs(page, VIEW):
        if view["model_id"] not in kept: bad(f"{name(c)} shows a widget whose state is not saved")
    return {
        "symbols documented": len(shown),
        "links": len(found),
        "widgets kept": len(state),
        "figures": check_figures(page, bad),
    }


def process():
    "The first half of `nbdev_docs`. (Not `nbdev_proc_nbs`, which would install Quarto.) Returns the sidebar."
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    refresh_quarto_yml()
    proc_nbs(n_workers=2, force=True)
    contents = yaml.safe_load((NBS / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    return list(pages(contents))


def pages(contents):
    "The pages of a sidebar with sections, in order."
    for entry in contents:
        if isinstance(entry, str): yield entry
        elif "section" in entry: yield from pages(entry["contents"])
        elif "href" in entry: yield entry["href"]


def module_of(nb):
    "The module that a notebook makes, with the package's name."
    found = [m[1] for c in nb["cells"] if (m := re.match(r"#\|\s*default_exp\s+(\S+)", text(c["source"])))]
    return f"memory_notebook.{''.join(found)}"


def check_index(nb, sidebar, chapters):
    "The index and the sidebar name every chapter once, in the order of the book. Returns what is wrong."
    prose = "\n".join(text(c["source"]) for c in nb["cells"] if c["cell_type"] == "markdown")
    want = [p.name for p in chapters if p.name != "index.ipynb"]
    listed = re.findall(r"\]\(([\w.]+\.ipynb)\)", prose.partition("## The book")[2])
    wrong = []
    if listed != want: wrong.append(f"index.ipynb lists {listed}, the book is {want}")
    if sidebar != ["index.ipynb", *want]: wrong.append(f"nbs/sidebar.yml lists {sidebar}, the book is {want}")
    return wrong


def check_docs():
    "Process, check, count. Returns the failures."
    from memory_notebook._modidx import d as modidx
    if "doc_host" not in modidx["settings"]: return ["memory_notebook/_modidx.py is empty: run nbdev_export"]
    failures = []
    counts = {}
    chapters = {p: read(p) for p in sorted(NBS.glob("*.ipynb")) if p.name[0] not in "_."}
    bad = lambda path: lambda message: failures.append(f"{path.name}: {message}")
    for path, nb in chapters.items(): check_source(nb, bad(path))
    try: sidebar = process()
    except Exception as e: return [*failures, "processing stopped. " + " ".join(str(e).split())[:300]]
    places = {
        "host": modidx["settings"]["doc_host"] + modidx["settings"]["doc_baseurl"],
        "pages": {slug(p.stem) + ".html" for p in chapters},
        "anchors": {tuple(place.split("#")) for symbols in modidx["syms"].values() for place, _ in symbols.values()},
    }
    for path, nb in chapters.items():
        if path.name not in sidebar: bad(path)("is not in the sidebar")
        if not (PROC / path.name).exists():
            bad(path)("was not processed")
            continue
        module = module_of(nb)
        public = [
            s for k in modidx["syms"].get(module, {}) if "." not in (s := k.removeprefix(module + ".")) and s[0] != "_"
        ]
        for k, n in check_page(PROC / path.name, nb, public, places, bad(path)).items():
            counts[k] = counts.get(k, 0) + n
    failures += check_index(chapters[INDEX], sidebar, chapters)
    print(f"docs: {len(chapters)} chapters processed, " + ", ".join(f"{n} {k}" for k, n in counts.items()))
    return failures


def readme():
    "README.md from the index notebook: prose as it is, code in fences, what the code showed below it."
    def from_top(m):
        return (
            m[0].replace(f"({m[3]}", f"(nbs/{m[3]}") if m[3][0] != "#" and (NBS / m[3].split("#")[0]).exists() else m[0]
        )
    parts = []
    for c in read(INDEX)["cells"]:
        s = text(c["source"]).strip()
        head = re.match(r"(#\|.*\n?)*", s)[0] if c["cell_type"] == "code" else ""
        if not s or c["cell_type"] == "raw" or re.search(r"hide|export|default_exp", head) or "nbdev_export()" in s:
            continue
        if c["cell_type"] == "markdown":
            parts.append(LINK.sub(from_top, s))
            continue
        if "echo: false" not in head: parts.append(f"```python\n{s.removeprefix(head).strip()}\n```")
        for o in c["outputs"]:
            data = o.get("data", {})
            if any(k.startswith("image/") for k in data):
                raise SystemExit(f"index.ipynb: {name(c)} draws: put the picture into nbs/assets")
            if "text/markdown" in data: parts.append(text(data["text/markdown"]).strip())
            elif shown := text(o.get("text", data.get("text/plain", ""))).rstrip(): parts.append(f"```\n{shown}\n```")
    title, _, rest = parts[0].partition("\n")
    made = "<!-- Made from nbs/index.ipynb by .ci/docs.py: do not edit. -->"
    return "\n\n".join(p for p in (title, made, rest.strip(), *parts[1:]) if p) + "\n"


def check_readme():
    "Returns the failures of README.md."
    if not INDEX.exists(): return ["nbs/index.ipynb is missing: README.md is made from it"]
    want = readme()
    words = len(re.sub(r"(?s)```.*?```", "", want).split())
    if not README.exists() or README.read_text(encoding="utf-8") != want:
        return ["README.md is not what nbs/index.ipynb makes: run .ci/docs.py --readme"]
    print(f"docs: README.md equals nbs/index.ipynb, {words} words")
    return ["README.md should have less than 800 words"] if words >= 800 else []


def main(args):
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    warnings.simplefilter("ignore")
    if set(args) - {"--readme", "--check"}: sys.exit(__doc__)
    if "--readme" in args: README.write_text(readme(), encoding="utf-8")
    failures = (check_docs() if not args else []) + check_readme()
    for f in failures: print(f"docs: FAILED {f}")
    return bool(failures)


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))

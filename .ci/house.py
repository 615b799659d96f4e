#!/usr/bin/env python3
"""Measure the house rules and keep the table of them in CONTRIBUTING.md.

    .ci/house.py           write the table
    .ci/house.py --check   fail when the table is out of date, or a number that must be 0 is not
    .ci/house.py --list    also name every place that counts
"""
import ast
import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Iterator, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "memory_notebook"
NBS = ROOT / "nbs"
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN = "<!-- house rules: made by .ci/house.py -->"
END = "<!-- end of house rules -->"
WIDTH = 120  # characters of a line
CELL = 100  # lines of an exported cell
MODULE = 750  # lines of a module
CHAIN = 2  # classes of ours above each other
# Another chapter, spoken of in prose
SPOKEN_OF = r"(?i)\b(?:the (?:next|last|previous) chapter|chapter (?:before|after|on|of) (?!this)(?!\[\])\w+(?: \w+)?)"


class Chapter(NamedTuple):
    "A notebook and the module it makes."
    path: Path
    cells: list[dict]
    module: str  # "" for the index

    def code(self) -> Iterator[str]:
        for c in self.cells:
            if c["cell_type"] == "code": yield "".join(c["source"])

    def prose(self) -> Iterator[str]:
        for c in self.cells:
            if c["cell_type"] == "markdown": yield "".join(c["source"])

    def exported(self) -> Iterator[str]:
        for s in self.code():
            if re.match(r"(#\|.*\n)*#\|\s*export", s): yield s


def chapters() -> list[Chapter]:
    "All notebooks, in the order of the book."
    out = []
    for path in sorted(NBS.glob("*.ipynb")):
        if path.name[0] in "_.": continue
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        named = [m[1] for c in cells if (m := re.match(r"#\|\s*default_exp\s+(\S+)", "".join(c["source"])))]
        out.append(Chapter(path, cells, "".join(named)))
    return out


def modules() -> dict[str, ast.Module]:
    "The modules that notebooks make, parsed: dotted name -> tree."
    return {c.module: ast.parse(file_of(c.module).read_text(encoding="utf-8")) for c in chapters() if c.module}


def file_of(module: str) -> Path: return PACKAGE / (module.replace(".", "/") + ".py")


def exports(tree: ast.Module) -> list[str]:
    "What a module says it exports."
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def origin(module: str, node: ast.ImportFrom) -> str:
    "The module of the package that an import names, without the package's own name; '' for others."
    if not node.level:
        inside = (node.module or "").startswith("memory_notebook.")
        return (node.module or "").removeprefix("memory_notebook.") if inside else ""
    base = module.split(".")[:-node.level]
    return ".".join([*base, *([node.module] if node.module else [])])


def chains() -> dict[str, int]:
    "How many of our own classes stand above each other, for each class."
    bases = {}
    for module, tree in modules().items():
        where = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (source := origin(module, node)):
                where |= {a.asname or a.name: (source, a.name) for a in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                names = [b.id for b in node.bases if isinstance(b, ast.Name)]
                bases[module, node.name] = [where.get(n, (module, n)) for n in names]
    def depth(key): return 1 + max((depth(b) for b in bases[key]), default=0) if key in bases else 0
    return {".".join(key): depth(key) for key in bases}


def long_chains() -> list[str]:
    "Classes at the end of a chain that is too long."
    return [f"{n} {name}" for name, n in chains().items() if n > CHAIN]


def names_twice() -> list[str]:
    "Names that several modules export."
    where = defaultdict(list)
    for module, tree in modules().items():
        for name in exports(tree): where[name].append(module)
    return [f"{name}: {', '.join(found)}" for name, found in where.items() if len(found) > 1]


def unused_names() -> list[str]:
    "Exported names that no other chapter, test or list of public names uses."
    public = {}
    for file in sorted((ROOT / "tests/public").glob("*.txt")):
        for line in file.read_text(encoding="utf-8").splitlines():
            if (name := line.partition("#")[0].strip()): public[name] = file.name
    used = set(public)
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    used |= {a.name for node in stub.body if isinstance(node, ast.ImportFrom) for a in node.names}
    used |= set(re.findall(r"\w+", re.search(r"(?s)\nCHAPTERS.*?\n}\n", file_of("experiments").read_text())[0]))
    used |= set(re.findall(r":(\w+)", (ROOT / "settings.ini").read_text()))  # the command line, the docs' processor
    for chapter in chapters():
        used |= {(chapter.module, n) for n in _imported("\n".join(_plain(s) for s in chapter.code()))}
    others = [*ROOT.glob("tests/*.py"), *ROOT.glob(".ci/*.py"), *PACKAGE.glob("bench/*.py")]
    for file in others: used |= _imported(file.read_text(encoding="utf-8"))
    elsewhere = defaultdict(set)
    for item in used:
        if isinstance(item, tuple): elsewhere[item[1]].add(item[0])
    trees = modules()
    unused = [f"{module}.{name}" for module, tree in trees.items() for name in exports(tree)
              if name not in used and not elsewhere[name] - {module}]
    real = {name for tree in trees.values() for name in exports(tree)}
    return unused + [f"{file}: {name} is exported nowhere" for name, file in public.items() if name not in real]


def _plain(source: str) -> str:
    "A cell without its magics."
    return re.sub(r"(?m)^[%!].*", "", source)


def _imported(source: str) -> set[str]:
    "The names that a text takes from the package: imported by name, or as attributes of an imported module."
    tree = ast.parse(source)
    names = set()
    aliases = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("memory_notebook"):
            names |= {a.name for a in node.names}
            aliases |= {a.asname or a.name for a in node.names}
        if isinstance(node, ast.Import): aliases |= {a.asname or a.name.partition(".")[0] for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            names.add(node.attr)
    return names


def ruff() -> list[tuple[str, str]]:
    "What ruff finds: rule and place."
    command = [Path(sys.executable).parent / "ruff", "check", "--output-format", "json"]
    done = subprocess.run([*command, "nbs", "memory_notebook", "tests", ".ci", "setup.py"],
                          cwd=ROOT, capture_output=True, text=True)
    if done.returncode > 1: raise SystemExit(done.stderr)
    short = lambda f: str(Path(f["filename"]).relative_to(ROOT))
    return [(f["code"], f"{short(f)} cell {f['cell']} line {f['location']['row']}: {f['code']} {f['message']}")
            for f in json.loads(done.stdout)]


def lines(source: str) -> int:
    "Lines of a cell that are not empty."
    return sum(bool(line.strip()) for line in source.splitlines())


def long_cells() -> list[str]:
    "Exported cells of more than a hundred lines."
    return [f"{c.path.name}: {lines(s)} lines, {s.splitlines()[1][:60]}"
            for c in chapters() for s in c.exported() if lines(s) > CELL]


def under_forty() -> str:
    "How many of the exported cells have at most forty lines."
    sizes = [lines(s) for c in chapters() for s in c.exported()]
    return f"{sum(n <= 40 for n in sizes) / len(sizes):.0%}"


def long_modules() -> list[str]:
    "Modules of more lines than a chapter should make."
    sizes = {m: len(file_of(m).read_text(encoding="utf-8").splitlines()) for m in modules()}
    return [f"{m}: {n} lines" for m, n in sizes.items() if n > MODULE]


def without_figure() -> list[str]:
    "Chapters without a picture."
    drawn = lambda c: any(k.startswith("image/") for o in c.get("outputs", []) for k in o.get("data", {}))
    shown = lambda c: re.search(r"!\[|<img|<svg", "".join(c["source"]) + json.dumps(c.get("outputs", "")))
    return [c.path.name for c in chapters() if c.module and not any(drawn(x) or shown(x) for x in c.cells)]


def without_guide() -> list[str]:
    "Chapters whose first cell does not say what they need, where they lead, and who may skip them."
    said = lambda s: all(word in s for word in ("**Needs**", "**leads to**", "**may be skipped by**"))
    return [c.path.name for c in chapters() if c.module and not said(next(c.prose(), ""))]


def _text(markdown: str) -> str:
    "Prose without blocks of code and formulas."
    return re.sub(r"(?s)```.*?```|\$\$.*?\$\$", "", markdown)


def _anchor(heading: str) -> str:
    "The anchor of a heading, as Quarto makes it."
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", heading.lower()).strip()).strip("-.")


def dead_links() -> list[str]:
    "Links to chapters, headings or files that are not there; chapters that are named without a link."
    book = {c.path.name: {_anchor(h) for s in c.prose() for h in re.findall(r"(?m)^#+ (.+)$", s)} for c in chapters()}
    stems = {name.removesuffix(".ipynb") for name in book} - {"index"}
    out = []
    for chapter in chapters():
        for markdown in map(_text, chapter.prose()):
            for target in re.findall(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)", markdown):
                file, _, anchor = target.partition("#")
                if re.match(r"[a-z]+:", target): continue
                if file and not (NBS / file).exists(): out.append(f"{chapter.path.name}: {target} is not there")
                elif anchor and file in book and anchor not in book[file]:
                    out.append(f"{chapter.path.name}: {target} has no such heading")
            bare = re.sub(r"\[[^\]]*\]\([^)]*\)", "[]", markdown)
            for said in re.findall(SPOKEN_OF, bare): out.append(f"{chapter.path.name}: '{said}' is no link")
            for stem in re.findall(r"\b\d\d[a-z]?_[a-z0-9_]+", bare):
                if stem in stems: out.append(f"{chapter.path.name}: {stem} is named without a link")
                elif not re.match(r"\d\d_\d", stem): out.append(f"{chapter.path.name}: there is no chapter {stem}")
    return out


def wrong_names() -> list[str]:
    "Backticked names that the docs link to another chapter although this one means a name of its own."
    home = {}
    for module, tree in modules().items(): home |= dict.fromkeys(exports(tree), module)
    out = []
    for chapter in chapters():
        source = "\n".join(map(_plain, chapter.code()))
        tree = ast.parse(source)
        own = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        own |= {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        own |= {a.arg for n in ast.walk(tree) if isinstance(n, ast.arguments) for a in [*n.args, *n.kwonlyargs]}
        own |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
        taken = _imported(source)
        for markdown in map(_text, chapter.prose()):
            for name in re.findall(r"(?<!`)`([A-Za-z_]\w*)(?:\(\))?`(?!`)", markdown):
                if name in own and name not in taken and home.get(name, chapter.module) != chapter.module:
                    out.append(f"{chapter.path.name}: `{name}` leads to {home[name]}")
    return sorted(set(out))


class Rule(NamedTuple):
    "One line of the table."
    what: str
    found: list[str]


def rules() -> list[Rule]:
    "All that is counted and must be none."
    linted = ruff()
    of = lambda *codes: [place for code, place in linted if code in codes]
    rest = [place for code, place in linted if code not in ("E501", "E702", "E703")]
    return [
        Rule(f"classes with more than {CHAIN} of our own classes in a chain of inheritance", long_chains()),
        Rule("names exported by two modules", names_twice()),
        Rule("exported names that nothing else uses and no list of public names holds", unused_names()),
        Rule(f"lines over {WIDTH} characters", of("E501")),
        Rule("statements joined by `;`", of("E702", "E703")),
        Rule("other findings of ruff (F, I, B)", rest),
        Rule(f"exported cells over {CELL} lines", long_cells()),
        Rule(f"modules over {MODULE} lines", long_modules()),
        Rule("chapters without a figure", without_figure()),
        Rule("chapters that do not say what they need and where they lead", without_guide()),
        Rule("links that lead nowhere, chapters named without a link", dead_links()),
        Rule("backticked names that lead to the wrong page", wrong_names()),
    ]


def table(found: list[Rule]) -> str:
    "The table as Markdown."
    rows = [f"| {rule.what} | {len(rule.found)} |" for rule in found]
    return "\n".join(["| house rule | places |", "|---|---|", *rows,
                      f"| longest chain of inheritance of our own classes | {max(chains().values())} |",
                      f"| exported cells of at most 40 lines (at least nine in ten) | {under_forty()} |"])


def main(arguments: list[str]) -> bool:
    if set(arguments) - {"--check", "--list"}: sys.exit(__doc__)
    found = rules()
    new = f"{BEGIN}\n{table(found)}\n{END}"
    page = PAGE.read_text(encoding="utf-8")
    made = re.sub(f"(?s){re.escape(BEGIN)}.*?{re.escape(END)}", lambda m: new, page)
    print(table(found))
    if "--list" in arguments:
        for rule in found:
            if rule.found: print(f"\n{rule.what}:", *rule.found, sep="\n  ")
    if "--check" not in arguments:
        PAGE.write_text(made, encoding="utf-8")
        return False
    broken = [rule for rule in found if rule.found]
    for rule in broken: print(f"\nFAILED {rule.what}:", *rule.found[:20], sep="\n  ")
    if made != page: print("FAILED the table in CONTRIBUTING.md is out of date: run .ci/house.py")
    return bool(broken) or made != page or int(under_forty().rstrip("%")) < 90


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))

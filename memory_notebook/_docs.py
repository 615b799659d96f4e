"""What `help()` and `?` show: the comment beside a parameter stands in the docstring too.

In this package a parameter is explained once, by the comment beside it. The pages of the book print it there; Python
itself forgets comments. So when a module of the package is imported, its docstrings get a section `Parameters`, in
numpy's form, made from the signatures in its source. Nothing else of a module is changed.
"""
import re
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder, SourceFileLoader
from types import FunctionType, ModuleType

_STRING = re.compile(r"\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'")
_NAMED = re.compile(r"\*{0,2}[A-Za-z_]\w*")
_FIELD = re.compile(r"    ([A-Za-z_]\w*\s*:[^#]*?)\s*(?:#\s*(.*))?$")

Parameter = tuple[str, str]  # name: type = default, as its line in the source has it; the comment
_of_code: dict = {}  # code of a function -> its parameters, for classes that inherit an `__init__`
_of_class: dict = {}  # dataclass or named tuple -> its fields, for those that extend it


def _split(line: str) -> tuple[str, str]:
    "Code and comment of a line."
    masked = _STRING.sub(lambda m: "_" * len(m[0]), line)
    at = masked.find("#")
    return (line, "") if at < 0 else (line[:at], line[at + 1:].strip())


def _pieces(code: str, depth: int) -> tuple[list[str], int]:
    "The parts of a line between the commas of the parameter list, and the depth of brackets at its end."
    masked = _STRING.sub(lambda m: "_" * len(m[0]), code)
    parts = []
    start = 0
    for i, c in enumerate(masked):
        if c in "([{":
            depth += 1
            if depth == 1: start = i + 1
        elif c in ")]}":
            depth -= 1
            if depth == 0:
                parts.append(code[start:i])
                return parts, 0
        elif c == "," and depth == 1:
            parts.append(code[start:i])
            start = i + 1
    return [*parts, code[start:]] if depth else parts, depth


def _signature(lines: list[str], start: int) -> tuple[list[Parameter], str]:
    "The parameters of the function that begins at a line (counted from 1), and the comment behind its return type."
    at = start - 1
    while not re.match(r"\s*(async\s+)?def\s", lines[at]): at += 1
    found = []
    above = []
    depth = 0
    for line in lines[at:]:
        code, comment = _split(line)
        if not code.strip():
            above.append(comment)
            continue
        outer = depth
        parts, depth = _pieces(code, depth)
        named = [p.strip() for p in parts if (m := _NAMED.match(p.strip())) and m[0] not in ("self", "cls")]
        said = comment or " ".join(above)
        if outer <= 1:
            closing = depth == 0 and outer == 1 and code.lstrip().startswith(")")
            own = depth > 0 or outer > 0 or len(named) == 1  # in a signature of one line the comment may mean the body
            found += [] if closing else [(p, said if own else "") for p in named]
        elif comment and found: found[-1] = (found[-1][0], comment)
        above = []
        if depth == 0: return found, comment if code.rstrip().endswith(":") else ""
    return found, ""


def _text(doc: str | None, parameters: list[Parameter], returns: str = "") -> str:
    "A docstring with its sections."
    from inspect import cleandoc  # slow to import: not for `import memory_notebook` alone
    parts = [cleandoc(doc or "")]
    if parameters:
        rows = [f"{declared}\n    {comment}" if comment else declared for declared, comment in parameters]
        parts.append("Parameters\n----------\n" + "\n".join(r.replace(":", " :", 1) for r in rows))
    if returns: parts.append(f"Returns\n-------\n{returns}")
    return "\n\n".join(p for p in parts if p)


def _fields(lines: list[str], cls: type) -> list[Parameter]:
    "The fields of a dataclass or a named tuple, from its body; those of the classes that it extends come first."
    begin = next((i for i, s in enumerate(lines) if re.match(rf"class {cls.__name__}\b", s)), len(lines))
    found = {p[0].split(":")[0].strip(): p for base in cls.__mro__[:0:-1] for p in _of_class.get(base, [])}
    above = []
    for line in lines[begin + 1:]:
        if line[:1].strip(): break
        if line.lstrip().startswith("#"): above.append(line.strip(" #"))
        else:
            m = _FIELD.match(line)
            name = m and m[1].split(":")[0].strip()
            if name in cls.__annotations__: found[name] = (m[1], m[2] or " ".join(above))
            above = []
    return list(found.values())


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    "What is defined in a module: functions, methods, and what wraps them."
    for value in list(vars(module).values()):
        inside = vars(value).values() if isinstance(value, type) and value.__module__ == module.__name__ else ()
        for f in (value, *inside):
            f = getattr(f, "__func__", f)  # a class method, a static method
            if isinstance(f, FunctionType) and f.__module__ == module.__name__: yield f


def explain(module: ModuleType, source: str) -> None:
    "Put the comments of a module's signatures into its docstrings."
    from inspect import unwrap
    lines = source.splitlines()
    for f in dict.fromkeys(_functions(module)):  # each once, whatever names it has
        code = unwrap(f).__code__
        if code.co_filename != module.__file__ or code.co_name == "<lambda>": continue
        parameters, returns = _signature(lines, code.co_firstlineno)
        _of_code[code] = parameters
        told = any(comment for _, comment in parameters) or returns
        if told and f.__name__ != "__init__": f.__doc__ = _text(f.__doc__, parameters, returns)
    classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    for cls in dict.fromkeys(classes):
        if "__annotations__" in vars(cls) and (hasattr(cls, "__dataclass_fields__") or hasattr(cls, "_fields")):
            parameters = _of_class[cls] = _fields(lines, cls)
        else: parameters = _of_code.get(getattr(cls.__init__, "__code__", None), [])
        if any(comment for _, comment in parameters): cls.__doc__ = _text(vars(cls).get("__doc__") or "", parameters)


class _Loader(SourceFileLoader):
    "Loads a module and explains it."
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        explain(module, self.get_source(module.__name__))


class _Finder:
    "Finds the modules of this package."
    @staticmethod
    def find_spec(name: str, path=None, target=None):
        if not name.startswith("memory_notebook."): return None
        spec = PathFinder.find_spec(name, path, target)
        if spec and type(spec.loader) is SourceFileLoader: spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    "Let every import of a module of this package explain it."
    if _Finder not in sys.meta_path: sys.meta_path.insert(0, _Finder)

"""What is not installed is named in one line: which part of the package asks for it, and the extra that brings it."""
import sys

# The extra of settings.ini that brings a module.
EXTRAS = {
    "accelerate": "train",
    "matplotlib": "train",
    "sklearn": "train",
    "PIL": "train",
    "transformers": "language",
    "tokenizers": "language",
    "filelock": "language",
    "ipywidgets": "live",
    "anywidget": "live",
    "peft": "real",
    "cpprb": "bench",
    "product_key_memory": "bench",
    "joblib": "scale",
    "ray": "scale",
    "lancedb": "scale",
}


class _Missing:
    "The last of Python's finders: it is asked for a module that no other one has found."
    @staticmethod
    def find_spec(name: str, path=None, target=None):
        if name not in EXTRAS: return None
        frame = sys._getframe(1)
        while frame and "importlib" in frame.f_globals.get("__name__", ""):
            if frame.f_globals["__name__"] == "importlib.util": return None  # it is only asked whether it is there
            frame = frame.f_back
        asks = frame.f_globals.get("__name__", "") if frame else ""
        if not asks.startswith("memory_notebook."): return None  # others may look whether it is there
        raise ModuleNotFoundError(f"{asks} needs {name}: pip install 'memory_notebook[{EXTRAS[name]}]'", name=name)


def install() -> None:
    "Let every import of the package that fails for want of an extra say so."
    if _Missing not in sys.meta_path: sys.meta_path.append(_Missing)

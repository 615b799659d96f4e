"""A literate library of neural memory: explained, tested and measured in notebooks."""
import lazy_loader as _lazy

from . import _docs, _extras

__version__ = "0.1.0"
_docs.install()  # `help()` and `?` show what stands beside each parameter
_extras.install()  # a missing extra is named
# What `__init__.pyi` lists is imported when it is asked for: `import memory_notebook` alone loads no torch.
__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)

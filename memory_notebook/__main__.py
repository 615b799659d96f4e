"""`python -m memory_notebook` is the command `memory_notebook`."""
import sys

from memory_notebook.experiments import main

if __name__ == "__main__": sys.exit(main())

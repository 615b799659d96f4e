"""What other libraries and plain implementations are timed with: the contestants of `memory_notebook bench`."""

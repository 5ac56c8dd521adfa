"""The jobs: thin command-line programs over the library, run as `python -m experiments.NAME`."""

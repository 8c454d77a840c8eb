"""The benchmark suite: `python -m bench --help` from the root of the repository."""

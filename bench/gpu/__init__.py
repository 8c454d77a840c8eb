"""What `bench/gpu.sh` runs on a card: steps with a time limit each, in processes that may die, and their tables.

`__main__` starts a worker and watches it; `worker` runs the steps of `run1` or `run2`, among them `correctness` and
`tiny`; `tables` prints what was found.
"""

"""What the method does, measured: each study is `python -m bench.studies.NAME`, `workers` is their helper.

None imports an operation's timings."""

"""What the method does, measured: each study is `python -m bench.studies.NAME`; none imports an operation's timings."""

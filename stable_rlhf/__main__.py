"""``python -m stable_rlhf`` is the command line: the form that launchers start (``deepspeed --module stable_rlhf run …``)."""

from stable_rlhf.cli import main

main()

"""``python -m stable_rlhf`` is the command line, as launchers start it (``deepspeed --module stable_rlhf run …``)."""

from stable_rlhf.cli.commands import main

main()

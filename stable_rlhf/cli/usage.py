"""What the command line says of itself, and how it refuses: all that works without the libraries of an extra."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from stable_rlhf.settings.variants import VARIANTS
from stable_rlhf.show.progress import printable

USAGE = f"""\
usage: stable-rlhf COMMAND [options]

Advantage Model and Selective Rehearsal (arXiv 2309.10202) for RLHF that stays stable.

whole runs
  quickstart     the whole method in a generated skill world: no data, no download, a few minutes
  run RECIPE     every stage of a YAML recipe; finished stages are not redone
  launch RECIPE  `run` on several devices or nodes; --dry-run: the commands and the memory they need
  study RECIPE   `run` for several seeds, and a comparison with intervals over them; goes on after a kill

single stages
  sft            supervised fine-tuning of a policy
  strength       how sure several reward models are of each preference pair, for reading and for denoising
  train-scorer   reward model or Advantage Model (--objective rm|am)
  select         rehearsal data: embed, cluster, keep the best of each cluster (--scorer DIR, or --candidates FILE)
  train-ppo      one policy (--variant {"|".join(VARIANTS)})
  export         a scorer's reward model for plain transformers (sequence classification): --scorer DIR --output-dir D
  evaluate       a report on scorers (accuracy, calibration, tasks) and on policies against SFT (win, lose, tie)

  env            what a bug report needs: versions, devices, kernels, compilers, launcher variables

`stable-rlhf COMMAND --help` lists a command's settings. Every setting of a recipe can be given on the command line:
  stable-rlhf run recipes/smollm2-pairs.yaml --data-dir DIR --ppo.total_steps 10
Several processes (launch writes torchrun's command; deepspeed, torchrun and accelerate launch work as well):
  stable-rlhf launch --dry-run recipes/h100x8-7b.yaml
  stable-rlhf launch --devices-per-node 2 recipes/smollm2-pairs.yaml --data-dir DIR
  stable-rlhf launch --hostfile HOSTS recipes/h100x8-7b.yaml --data-dir DIR
  deepspeed --num_accelerators 2 --module stable_rlhf run recipes/smollm2-pairs.yaml --data-dir DIR
"""


def fail(message: str, *, hint: str = "") -> NoReturn:
    """One clear message on standard error, exit status 2."""
    rank = os.environ.get("RANK", "0")
    message = printable(message.strip(), lines=False)
    print(f"stable-rlhf: error: {message}" + (f" (rank {rank})" if rank != "0" else ""), file=sys.stderr)
    if hint and rank == "0":
        print(f"  {printable(hint, lines=False)}", file=sys.stderr)
    raise SystemExit(2)

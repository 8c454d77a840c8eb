"""The command line in forks of this process, which has imported everything: see ``Server`` in helpers/cli.py."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    import deepspeed  # noqa: F401
    import transformers  # noqa: F401
    from torch.utils import tensorboard  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM  # noqa: F401

    import stable_rlhf.cli.commands  # noqa: F401
    import stable_rlhf.run.recipe  # noqa: F401

    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        call = json.loads(line)
        children = [_fork(call, rank) for rank in range(len(call["outputs"]))]
        codes: list[int | None] = [None] * len(children)
        kill, began = call["kill"], time.monotonic()
        while None in codes:
            for rank, child in enumerate(children):
                if codes[rank] is None:
                    ended, status = os.waitpid(child, os.WNOHANG)
                    codes[rank] = os.waitstatus_to_exitcode(status) if ended else None
            if kill is not None and (
                any(Path(call["cwd"]).glob(kill)) if isinstance(kill, str) else time.monotonic() - began > kill
            ):
                kill = None
                for rank in call["who"]:
                    if codes[rank] is None:
                        os.kill(children[rank], call["sign"])
            time.sleep(0.005)
        replies.write(json.dumps(codes) + "\n")
        replies.flush()


def _fork(call: dict[str, Any], rank: int) -> int:
    """Start one rank of a call; returns its process id."""
    child = os.fork()
    if child:
        return child
    for number, name in enumerate(call["outputs"][rank], 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.chdir(call["cwd"])
    os.environ.update(call["env"])
    if "WORLD_SIZE" in call["env"] and "RANK" not in call["env"]:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    sys.argv = ["stable-rlhf", *call["argv"]]
    code: Any = 0
    try:
        from stable_rlhf.cli.commands import main as command_line

        command_line()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()

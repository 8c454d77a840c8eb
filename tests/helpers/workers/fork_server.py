"""Calls in forks of this process, which has imported what they need: see ``Server`` in helpers/forks.py."""

from __future__ import annotations

import functools
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any


def import_for_commands() -> None:
    import deepspeed  # noqa: F401
    import matplotlib.backends.backend_agg  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import scipy.special  # noqa: F401
    import setuptools  # noqa: F401  DeepSpeed's, as is what follows
    import transformers  # noqa: F401
    from deepspeed.ops import __compatible_ops__  # noqa: F401  asks a compiler
    from torch.utils import tensorboard  # noqa: F401
    from transformers import (  # noqa: F401
        AutoModelForCausalLM,
        AutoTokenizer,
        BloomForCausalLM,
        GenerationConfig,
        LlamaForCausalLM,
    )

    import stable_rlhf.cli.commands  # noqa: F401
    import stable_rlhf.run.recipe  # noqa: F401
    from stable_rlhf.cli import arguments

    arguments.build_parser = functools.cache(arguments.build_parser)  # see `prepare`


def prepare(call: dict[str, Any]) -> None:
    """What takes long and is the same in every call of a command: its parser of all settings."""
    from stable_rlhf.cli import arguments

    command = call["argv"][0] if call["argv"] else ""
    if not call["script"] and command in arguments.COMMANDS:
        arguments.build_parser(command)


def import_for_tests() -> None:
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch._dynamo  # noqa: F401
    import triton.runtime.interpreter  # noqa: F401

    import helpers.interpreter  # noqa: F401
    import kernels  # noqa: F401
    import stable_rlhf.ops  # noqa: F401


def main() -> None:
    serves = sys.argv[1]
    {"commands": import_for_commands, "tests": import_for_tests}[serves]()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        call = json.loads(line)
        if serves == "commands":
            prepare(call)
        children = [_fork(call, rank, serves) for rank in range(len(call["outputs"]))]
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
            if call["script"] and any(codes):  # a rank that waits for one that failed would wait for half an hour
                for rank, child in enumerate(children):
                    if codes[rank] is None:
                        os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
        replies.write(json.dumps(codes) + "\n")
        replies.flush()


def _fork(call: dict[str, Any], rank: int, serves: str) -> int:
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
    code: Any = 0
    try:
        code = _work(call, serves)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _work(call: dict[str, Any], serves: str) -> int:
    sys.argv = [call["script"] or "stable-rlhf", *call["argv"]]
    if call["script"]:
        sys.path[:0] = call["env"]["PYTHONPATH"].split(os.pathsep)
        from helpers.pages import leave_out_curves

        leave_out_curves()
        runpy.run_path(call["script"], run_name="__main__")
    elif serves == "tests":
        import pytest

        return int(pytest.main(call["argv"]))
    else:
        from stable_rlhf.cli.commands import main as command_line

        command_line()
    return 0


if __name__ == "__main__":
    main()

"""Steps of PPO or GRPO a second: the quickstart's model, batch and lengths, random weights.

    python -m bench.studies.trainer_speed [--steps 12] [--rounds 3]             # PPO with Selective Rehearsal
    python -m bench.studies.trainer_speed --method grpo [--trl PYTHON]          # GRPO, beside TRL's GRPOTrainer

PPO has 32 rehearsal sequences in every micro-step and a value head on the policy. TRL's PPO trainer, which
`bench/results/trainer-speed.json` has beside it, ended with TRL 0.29. GRPO is the same work in both trainers: 32
prompts of four responses, one update a step over two micro-batches, the KL penalty k3 in the loss to a reference model,
one reward that costs nothing, no rehearsal. A round is a process of its own, ours and TRL's in turn; PYTHON is that of
an environment that has TRL (the slow tests of tests/integrations/test_trl.py make one in build/frameworks/trl).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BATCH, MICRO, EPOCHS, MINI_BATCHES, NEW_TOKENS, REHEARSAL = 128, 64, 2, 2, 10, 32
SETTINGS: dict[str, Any] = {
    "learning_rate": 2e-4, "kl_coef": 0.05, "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1, "lam": 0.95,
}  # fmt: skip
GROUP = 4


def prepare(folder: Path) -> None:
    """The quickstart's model with random weights, and prompts of the skill world as token ids."""
    from stable_rlhf.data.encoding import encode_prompt
    from stable_rlhf.data.readers import read_prompts
    from stable_rlhf.world import build_model, build_tokenizer, write_world

    tokenizer = build_tokenizer()
    build_model(tokenizer, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, seed=0).save_pretrained(
        folder / "model"
    )
    tokenizer.save_pretrained(folder / "model")
    files = write_world(folder / "world", 0)
    prompts = [encode_prompt(tokenizer, row.prompt) for row in read_prompts([str(files.prompts)]).rows]
    (folder / "prompts.json").write_text(
        json.dumps([ids for ids in prompts if len(ids) <= 32][:2048]), encoding="utf-8"
    )


def run_ours(folder: Path, steps: int) -> list[float]:
    from stable_rlhf.data.encoding import Encoded
    from stable_rlhf.data.prompts import EncodedPrompt
    from stable_rlhf.data.records import PromptRow
    from stable_rlhf.engine.process import start
    from stable_rlhf.models.loading import load_causal_lm, load_tokenizer
    from stable_rlhf.models.policy import PolicyModel
    from stable_rlhf.policy.ppo import PPOTrainer
    from stable_rlhf.scorer import AdvantageModel, ScorerSettings
    from stable_rlhf.settings.recipe import Recipe
    from stable_rlhf.settings.stages import PPOArguments

    start(0)
    name = str(folder / "model")
    tokenizer = load_tokenizer(name)
    prompts = [
        EncodedPrompt(PromptRow("?"), ids) for ids in json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    ]
    rehearsal = [Encoded((*p.ids, *p.ids[-5:], tokenizer.eos_token_id), len(p.ids)) for p in prompts[:200]]
    arguments = PPOArguments(
        total_steps=steps, rollout_batch_size=BATCH, per_device_train_batch_size=MICRO, num_ppo_epochs=EPOCHS,
        num_mini_batches=MINI_BATCHES, max_new_tokens=NEW_TOKENS, per_device_rehearsal_batch_size=REHEARSAL, **SETTINGS,
    )  # fmt: skip
    scorer = AdvantageModel(load_causal_lm(name).base_model, tokenizer, ScorerSettings("am", 2, 1))
    recipe = Recipe(ppo=arguments, report_to=[])
    trainer = PPOTrainer(
        PolicyModel(load_causal_lm(name), value_head=True), tokenizer, scorer, recipe, rehearsal=rehearsal
    )
    curve = trainer.train(prompts, folder / "ours")["curve"]
    return [row["seconds"] for row in curve]


def run_grpo(folder: Path, steps: int) -> list[float]:
    from stable_rlhf.data.prompts import EncodedPrompt
    from stable_rlhf.data.records import PromptRow
    from stable_rlhf.engine.process import start
    from stable_rlhf.models.loading import load_causal_lm, load_tokenizer
    from stable_rlhf.models.policy import PolicyModel
    from stable_rlhf.policy.ppo import PPOTrainer
    from stable_rlhf.settings.recipe import Recipe
    from stable_rlhf.settings.stages import PPOArguments, RewardArguments

    start(0)
    name = str(folder / "model")
    prompts = [
        EncodedPrompt(PromptRow("?"), ids) for ids in json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    ]
    arguments = PPOArguments(
        total_steps=steps, rollout_batch_size=BATCH, per_device_train_batch_size=MICRO, max_new_tokens=NEW_TOKENS,
        advantage_estimator="grpo", num_generations=GROUP, learning_rate=SETTINGS["learning_rate"],
        kl_coef=SETTINGS["kl_coef"], kl_in="loss", kl_estimator="k3",
    )  # fmt: skip
    recipe = Recipe(ppo=arguments, rewards=RewardArguments(functions=["length"]), report_to=[])
    trainer = PPOTrainer(PolicyModel(load_causal_lm(name)), load_tokenizer(name), None, recipe, estimator="grpo")
    return [row["seconds"] for row in trainer.train(prompts, folder / "grpo")["curve"]]


def run_trl(folder: Path, steps: int) -> list[float]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    name = str(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(name)
    texts = [tokenizer.decode(ids) for ids in json.loads((folder / "prompts.json").read_text(encoding="utf-8"))]
    ends = [time.perf_counter()]

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    arguments = GRPOConfig(
        str(folder / "trl"), per_device_train_batch_size=MICRO, gradient_accumulation_steps=BATCH // MICRO,
        num_generations=GROUP, max_completion_length=NEW_TOKENS, max_steps=steps, beta=SETTINGS["kl_coef"],
        learning_rate=SETTINGS["learning_rate"], loss_type="grpo", use_cpu=True, bf16=False, report_to=[],
        save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(name),
        reward_funcs=lambda completion_ids, **_: [len(ids) / NEW_TOKENS for ids in completion_ids],
        train_dataset=Dataset.from_list([{"prompt": text} for text in texts]), processing_class=tokenizer,
        args=arguments, callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    return [end - start for start, end in pairwise(ends)]


WORKERS = {"ours": run_ours, "grpo": run_grpo, "trl": run_trl}
WARM_UP = 2  # the first steps pay for imports and warm-up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("ppo", "grpo"), default="ppo")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trl", type=Path, default=ROOT / "build" / "frameworks" / "trl" / "bin" / "python")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", choices=("prepare", *WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        import torch

        torch.set_num_threads(given.threads)
        if given.worker == "prepare":
            return prepare(given.folder)
        seconds = WORKERS[given.worker](given.folder, given.steps)
        (given.folder / f"{given.worker}.json").write_text(json.dumps(seconds), encoding="utf-8")
        return None
    workers = {"ours": sys.executable} if given.method == "ppo" else {"grpo": sys.executable, "trl": str(given.trl)}
    if missing := [python for python in workers.values() if not Path(python).is_file()]:
        sys.exit(f"no {missing[0]}: --trl names the python of an environment that has TRL")
    samples: dict[str, list[float]] = {worker: [] for worker in workers}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def run(worker: str, python: str) -> None:
            done = subprocess.run(
                [python, __file__, "--worker", worker, "--folder", name, "--steps", str(given.steps),
                 "--threads", str(given.threads)], capture_output=True, encoding="utf-8", cwd=folder,
                env=os.environ | {"OMP_NUM_THREADS": str(given.threads), "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
            if done.returncode:
                sys.exit(f"{worker} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")

        run("prepare", sys.executable)
        for _ in range(given.rounds):
            for worker, python in workers.items():
                run(worker, python)
                samples[worker] += json.loads((folder / f"{worker}.json").read_text(encoding="utf-8"))[WARM_UP:]
    rates = {worker: 1 / statistics.median(seconds) for worker, seconds in samples.items()}
    for worker, rate in rates.items():
        print(f"{worker}: {rate:.2f} steps a second (median of {len(samples[worker])} steps)")
    if "trl" in rates:
        print(f"ours does {rates['grpo'] / rates['trl']:.2f} times as many")
    if given.output:
        import torch

        from bench.common import environment, write_json

        settings = {name: getattr(given, name) for name in ("method", "steps", "rounds", "threads")} | {"batch": BATCH}
        where = environment(torch.device("cpu")) | {"command": "python -m bench.studies.trainer_speed"}
        record = {"what": "trainer-speed", "environment": where, "settings": settings}
        write_json(record | {"steps_per_s": rates, "seconds": samples}, given.output)


if __name__ == "__main__":
    main()

"""Steps of PPO a second: the quickstart's model, batch and lengths, random weights.

    python -m bench.studies.trainer_speed [--steps 12] [--rounds 3]

It is PPO with Selective Rehearsal (32 rehearsal sequences in every micro-step) and a value head on the policy. A round
is a process of its own. TRL's PPO trainer, which `bench/results/trainer-speed.json` has beside it, ended with TRL 0.29.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BATCH, MICRO, EPOCHS, MINI_BATCHES, NEW_TOKENS, REHEARSAL = 128, 64, 2, 2, 10, 32
SETTINGS: dict[str, Any] = {
    "learning_rate": 2e-4, "kl_coef": 0.05, "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1, "lam": 0.95,
}  # fmt: skip


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", choices=("prepare", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        import torch

        torch.set_num_threads(given.threads)
        if given.worker == "prepare":
            return prepare(given.folder)
        (given.folder / "ours.json").write_text(json.dumps(run_ours(given.folder, given.steps)), encoding="utf-8")
        return None
    samples: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def run(worker: str) -> None:
            done = subprocess.run(
                [sys.executable, __file__, "--worker", worker, "--folder", name, "--steps", str(given.steps),
                 "--threads", str(given.threads)], capture_output=True, encoding="utf-8", cwd=folder,
                env=os.environ | {"OMP_NUM_THREADS": str(given.threads), "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
            if done.returncode:
                sys.exit(f"{worker} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")

        run("prepare")
        for _ in range(given.rounds):
            run("ours")
            # The first steps pay for imports and warm-up.
            samples += json.loads((folder / "ours.json").read_text(encoding="utf-8"))[2:]
    median = statistics.median(samples)
    print(f"{1 / median:.2f} steps a second (median of {len(samples)} steps)")
    if given.output:
        import torch

        from bench.common import environment, write_json

        settings = {"steps": given.steps, "rounds": given.rounds, "threads": given.threads, "batch": BATCH}
        where = environment(torch.device("cpu")) | {"command": "python -m bench.studies.trainer_speed"}
        record = {"what": "trainer-speed", "environment": where, "settings": settings}
        write_json(record | {"steps_per_s": {"ours": 1 / median}, "seconds": {"ours": samples}}, given.output)


if __name__ == "__main__":
    main()

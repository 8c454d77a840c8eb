"""Training the policy: SFT, PPO with Selective Rehearsal, rejection sampling, and what they watch."""

from stable_rlhf.system.extras import require

require("stable_rlhf.policy", "transformers", "safetensors", "deepspeed")

"""Language models: loading them, splitting a backbone, log-probs and losses inside one forward."""

from stable_rlhf.system.extras import require

require("stable_rlhf.models", "transformers", "safetensors")

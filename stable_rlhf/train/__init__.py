"""Training: settings, DeepSpeed engines, checkpoints, and the runs built from them."""

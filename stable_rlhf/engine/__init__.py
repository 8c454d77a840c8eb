"""The training engine, which knows DeepSpeed and no algorithm: weights, shards, snapshots, run folders, watchdog."""

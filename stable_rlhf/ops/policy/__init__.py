"""PPO and rehearsal tokens in one loss, and token log-probabilities."""

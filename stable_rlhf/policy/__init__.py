"""Training the policy: SFT, PPO with Selective Rehearsal, rejection sampling, and what they watch."""

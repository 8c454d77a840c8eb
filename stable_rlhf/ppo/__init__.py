"""PPO's parts: rewards and advantages from rollouts, and the loss of one mixed batch."""

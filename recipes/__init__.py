"""Recipes that are installed with the package; ``stable-rlhf run`` takes these and your own alike."""

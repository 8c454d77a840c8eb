"""From a recipe to stages: what a run does, in which order, from which files, and its summary."""

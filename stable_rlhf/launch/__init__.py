"""From a recipe to processes on one machine or many, and the memory that each needs."""

"""Losses that compare the rows of a batch by their cosines."""

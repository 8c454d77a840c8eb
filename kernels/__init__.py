"""Triton kernels, one file per operation; each file gives one Python function on tensors."""

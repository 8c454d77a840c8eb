"""Triton kernels, a file an operation or family; plain functions on tensors launch them."""

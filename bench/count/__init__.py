"""The ledger: what the CUDA path of every operation does, counted by running it over tensors without data.

`device` stands in for a GPU at the doors of PyTorch, `launches` for Triton's; both write `work`, which `rates` turns
into seconds. `cases` calls the operations, `command` and `page` show what came of it. Nothing here measures time.
"""

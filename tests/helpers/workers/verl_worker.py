"""verl beside our adapter, in an environment that has it: `verl_worker.py CASE`. Prints what it found."""

from __future__ import annotations

import copy
import os
import resource
import sys

import torch
import torch.distributed as dist
import transformers
import verl
from transformers import LlamaConfig, LlamaForCausalLM
from verl.models.transformers.monkey_patch import patch_forward_with_backends
from verl.utils.kernel import linear_cross_entropy as home

from stable_rlhf import ops
from stable_rlhf.integrations.verl import linear_cross_entropy, patch_linear_cross_entropy

VOCABULARY = 131


def tiny(vocabulary: int = VOCABULARY, *, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tied, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def with_backend(model, backend: str):
    patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=backend)  # of the class
    return model


def packed(vocabulary: int = VOCABULARY) -> tuple[torch.Tensor, torch.Tensor]:
    """Three sequences behind one another, as verl's engine passes them."""
    lengths = (9, 1, 14)
    ids = torch.randint(0, vocabulary, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    return ids, torch.cat([torch.arange(length) for length in lengths])[None]


def trained(model, backend: str, temperature: float) -> tuple[list[float], torch.Tensor]:
    """Losses of three steps and the weights, through verl's own forward."""
    ids, positions = packed()
    advantage = torch.randn(ids.shape[1], generator=torch.Generator().manual_seed(2))
    optimizer, losses, old = torch.optim.AdamW(model.parameters(), 1e-3, eps=1e-3), [], None
    for _ in range(3):
        output = with_backend(model, backend)(
            input_ids=ids, position_ids=positions, temperature=temperature, use_cache=False, return_dict=True
        )
        logprob, entropy = output.log_probs.squeeze(0), output.entropy.squeeze(0)  # as its engine does
        assert logprob.dtype == torch.float32 and logprob.shape == entropy.shape == advantage.shape
        old = logprob.detach() if old is None else old
        loss = -((logprob - old).exp() * advantage + 0.1 * entropy).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses += [float(loss.detach()), float(logprob.detach().mean())]
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()])


def forward() -> None:
    """verl's dense forward: its torch backend against its triton backend with our function in it."""
    own = home.linear_cross_entropy
    held = sys.modules["verl.holder"] = type(sys)("verl.holder")  # as Megatron's modules hold it
    held.linear_cross_entropy = own
    undo = patch_linear_cross_entropy()
    assert held.linear_cross_entropy is home.linear_cross_entropy is linear_cross_entropy
    for tied, temperature in ((False, 1.0), (True, 0.7)):
        model = tiny(tied=tied)
        losses, weights = trained(copy.deepcopy(model), "torch", temperature)
        fused_losses, fused_weights = trained(copy.deepcopy(model), "triton", temperature)
        apart = max(abs(a - b) for a, b in zip(losses, fused_losses, strict=True))
        moved = float((weights - fused_weights).abs().max())
        assert apart < 2e-5 and moved < 2e-5, (apart, moved)
        wrong_losses, wrong_weights = trained(copy.deepcopy(model), "triton", temperature * 1.01)  # negative control
        assert max(abs(a - b) for a, b in zip(losses, wrong_losses, strict=True)) > 1e-4
        assert float((weights - wrong_weights).abs().max()) > 1e-4
        print(f"tied {tied} T {temperature}: losses {apart:.1e}, weights {moved:.1e}")
    late = sys.modules["verl.late"] = type(sys)("verl.late")
    late.linear_cross_entropy = home.linear_cross_entropy
    undo()
    assert home.linear_cross_entropy is held.linear_cross_entropy is late.linear_cross_entropy is own


def function() -> None:
    """Reductions, types and a process group, against logits."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    draw = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(2, 5, 16, generator=draw), torch.randn(40, 16, generator=draw)
    labels = torch.randint(0, 40, (2, 5), generator=draw)
    wanted = (hidden @ weight.T / 0.7).log_softmax(-1)
    picked = wanted.gather(-1, labels[..., None]).flatten()
    for reduction, value in (("none", picked), ("sum", picked.sum()), ("mean", picked.mean()), ("MEAN", picked.mean())):
        logprob, entropy = linear_cross_entropy(hidden, weight, labels, 0.7, reduction, dist.group.WORLD)
        torch.testing.assert_close(logprob, value)
        torch.testing.assert_close(entropy, -(wanted.exp() * wanted).sum(-1).flatten())
    half = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels)
    assert all(x.dtype == torch.float32 for x in half)
    try:
        linear_cross_entropy(hidden, weight, labels, 0.7, "all")
    except ValueError as error:
        print(error)


def memory(whose: str) -> None:
    """The growth of the process in a log-prob step and its backward, V 151,936, 1,024 tokens."""
    model = tiny(151_936)
    ids = torch.randint(0, 151_936, (1, 1024))
    if whose == "ours":
        patch_linear_cross_entropy()

    def step(ids):
        model = with_backend(tiny_model, "triton" if whose == "ours" else "torch")
        output = model(input_ids=ids, temperature=1.0, use_cache=False, return_dict=True)
        (output.log_probs.sum() + output.entropy.sum()).backward()

    tiny_model = model
    step(ids[:, :2])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(ids)
    print(f"{whose} {(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10:.0f} MiB")


def plugin() -> None:
    """What `import verl` left in the place of its function."""
    print("ours" if home.linear_cross_entropy is linear_cross_entropy else "verl's", ops.__name__)


if __name__ == "__main__":
    print(f"verl {verl.__version__} transformers {transformers.__version__} torch {torch.__version__}")
    {"forward": forward, "function": function, "memory": memory, "plugin": plugin}[sys.argv[1]](*sys.argv[2:])

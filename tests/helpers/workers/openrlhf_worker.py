"""OpenRLHF beside our adapters, in an environment that has it: `openrlhf_worker.py CASE`. Prints what it found."""

from __future__ import annotations

import copy
import importlib.metadata
import resource
import sys
import tempfile
import types
from types import SimpleNamespace

# flash-attn's Python is what OpenRLHF imports; its CUDA library, and a Triton kernel that it would take, need a GPU.
sys.modules["flash_attn_2_cuda"] = types.ModuleType("flash_attn_2_cuda")
sys.modules["flash_attn.ops.triton.cross_entropy"] = None  # type: ignore[assignment]

import torch  # noqa: E402
import transformers  # noqa: E402
from openrlhf.models import Actor, PairWiseLoss, PolicyLoss, get_llm_for_sequence_regression  # noqa: E402
from openrlhf.trainer.rm_trainer import RewardModelTrainer  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from stable_rlhf import ops  # noqa: E402
from stable_rlhf.integrations.openrlhf import BoundedPairLoss, patch_actor  # noqa: E402


def tiny(folder: str, vocabulary: int = 131, *, tied: bool = False) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tied, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def actor_of(folder: str, packing: bool, temperature: float) -> Actor:
    made = Actor(folder, attn_implementation="sdpa", packing_samples=packing, temperature=temperature)
    return made.float()  # its own types have 16 bits


def rows(vocabulary: int = 131, batch: int = 4, length: int = 12) -> dict[str, torch.Tensor]:
    """Ragged: padded left and right; the last row has no action."""
    draw = torch.Generator().manual_seed(1)
    attention = torch.ones(batch, length, dtype=torch.int64)
    attention[0, :3], attention[1, -2:] = 0, 0
    action = attention[:, -7:].clone()
    action[2, :2], action[-1] = 0, 0
    return {
        "sequences": torch.randint(1, vocabulary, (batch, length), generator=draw),
        "attention_mask": attention,
        "action_mask": action,
        "advantages": torch.randn(batch, 7, generator=draw),
    }


def trained(actor: Actor, data: dict[str, torch.Tensor], steps: int = 3) -> tuple[list[float], torch.Tensor]:
    """Losses and weights, with the log-probs of the start as old ones."""
    mask, optimizer = data["action_mask"], torch.optim.AdamW(actor.parameters(), 1e-3, eps=1e-3)
    criterion, losses, old = PolicyLoss(dual_clip=3.0), [], None
    for _ in range(steps):
        logprob, output = actor(
            data["sequences"], mask, attention_mask=data["attention_mask"], return_output=True, return_entropy=True
        )
        old = logprob.detach() if old is None else old
        entropy = (output.entropy[:, -mask.shape[1] :] * mask).sum() / mask.sum()
        loss = criterion(logprob, old, data["advantages"], action_mask=mask)[0] - 0.1 * entropy
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses += [float(loss.detach()), float(entropy.detach())]
    return losses, torch.cat([p.detach().flatten() for p in actor.parameters()])


def actor() -> None:
    """Steps of the real Actor with its own forward and with ours."""
    data, calls = rows(), []
    linear_logprob = ops.linear_logprob

    def counted(hidden, *arguments, **named):
        calls.append(hidden.shape)
        return linear_logprob(hidden, *arguments, **named)

    ops.linear_logprob = counted
    for tied, packing, temperature in (
        (False, False, 1.0), (False, True, 1.0), (True, False, 0.7), (True, True, 0.7), (False, False, 2.0),
    ):  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            own = actor_of(tiny(folder, tied=tied), packing, temperature)
        ours, wrong = copy.deepcopy(own), copy.deepcopy(own)
        before = own.forward.__func__
        calls.clear()
        losses, weights = trained(own, data)
        assert not calls
        undo = patch_actor(ours)
        with torch.no_grad():  # without a mask: every column, padding too
            named = {"attention_mask": data["attention_mask"], "return_logprobs": True}
            every, fused = wrong(data["sequences"], **named), ours(data["sequences"], **named)
        worst = float((every - fused).abs().max())
        assert worst < 1e-5, worst
        fused_losses, fused_weights = trained(ours, data)
        assert len(calls) == 4, calls
        apart = max(abs(a - b) for a, b in zip(losses, fused_losses, strict=True))
        moved = float((weights - fused_weights).abs().max())
        assert apart < 2e-5 and moved < 2e-5, (apart, moved)
        patch_actor(wrong)
        wrong.temperature = temperature * 1.01  # negative control
        wrong_losses, wrong_weights = trained(wrong, data)
        assert max(abs(a - b) for a, b in zip(losses, wrong_losses, strict=True)) > 1e-4
        assert float((weights - wrong_weights).abs().max()) > 1e-4
        undo()
        assert ours.forward.__func__ is before and "forward" not in ours.model.__dict__
        assert "logits" in ours(data["sequences"], attention_mask=data["attention_mask"], return_output=True)
        print(f"tied {tied} packing {packing} T {temperature}: losses {apart:.1e}, weights {moved:.1e}")


class Strategy(SimpleNamespace):
    """What the reward trainer asks of DeepSpeed's strategy, on one process without it."""

    accumulated_gradient, ring_attn_group = 1, None

    def backward(self, loss, model, optimizer):
        loss.backward()

    def optimizer_step(self, optimizer, model, scheduler):
        optimizer.step()
        optimizer.zero_grad()

    def is_rank_0(self):
        return False

    def all_reduce(self, figures):
        return figures

    def get_grad_norm(self, model):
        return 0.0

    def print(self, *words):
        pass


def reward_steps(model, loss_fn, margins: bool) -> list[float]:
    """The real `RewardModelTrainer.fit` over three batches; every loss."""
    draw = torch.Generator().manual_seed(2)
    batches = []
    for _ in range(3):
        ids = torch.randint(1, 131, (2, 4, 1, 9), generator=draw)
        mask = torch.ones(4, 1, 9, dtype=torch.int64)
        batches.append((ids[0], mask, ids[1], mask, torch.rand(4, generator=draw).tolist()))
    args = SimpleNamespace(
        model=SimpleNamespace(aux_loss_coef=0.0, margin_loss_enable=margins, compute_fp32_loss_enable=True),
        ds=SimpleNamespace(packing_samples=False),
        logger=SimpleNamespace(wandb=SimpleNamespace(key=None), tensorboard_dir=None, logging_steps=1),
        eval=SimpleNamespace(steps=10), ckpt=SimpleNamespace(save_steps=10), train=SimpleNamespace(batch_size=4),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, eps=1e-3)

    class Loader(list):
        sampler = None

    trainer = RewardModelTrainer(
        model, Strategy(args=args), optimizer, Loader(batches), None,
        torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0), SimpleNamespace(pad_token_id=0), max_epochs=1,
        disable_ds_ckpt=True,
    )  # fmt: skip
    assert isinstance(trainer.loss_fn, PairWiseLoss)
    losses = []

    def noted(*arguments):
        losses.append(loss_fn(*arguments))
        return losses[-1]

    trainer.loss_fn = noted
    trainer.fit(args)
    return [float(loss.detach()) for loss in losses]


def reward() -> None:
    """The real reward trainer with its own loss and with ours: without bounds the same, with bounds another."""
    with tempfile.TemporaryDirectory() as folder:
        model = get_llm_for_sequence_regression(
            tiny(folder), "reward", attn_implementation="sdpa", init_value_head=True, value_head_prefix="score"
        ).float()
    with torch.no_grad():
        model.score.weight.mul_(20)  # so that some scores pass the bounds
    for margins in (False, True):
        own, ours, bounded = (copy.deepcopy(model) for _ in range(3))
        losses = reward_steps(own, PairWiseLoss(), margins)
        fused = reward_steps(ours, BoundedPairLoss(margin=None), margins)
        apart = max(abs(a - b) for a, b in zip(losses, fused, strict=True))
        weights = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (own, ours)]
        moved = float((weights[0] - weights[1]).abs().max())
        assert apart < 2e-6 and moved < 2e-6, (apart, moved)
        held = reward_steps(bounded, BoundedPairLoss(), margins)
        assert max(abs(a - b) for a, b in zip(losses, held, strict=True)) > 1e-3
        print(f"margins {margins}: losses {apart:.1e}, weights {moved:.1e}")


def memory(whose: str) -> None:
    """The growth of the process in a log-prob step and its backward, V 151,936."""
    with tempfile.TemporaryDirectory() as folder:
        actor = actor_of(tiny(folder, 151_936), False, 1.0)
    data = rows(151_936, batch=4, length=256)
    mask = torch.ones(4, 255, dtype=torch.int64)
    if whose == "ours":
        patch_actor(actor)
    actor(data["sequences"][:, :2], mask[:, :1], attention_mask=data["attention_mask"][:, :2]).sum().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    actor(data["sequences"], mask, attention_mask=data["attention_mask"]).sum().backward()
    print(f"{whose} {(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10:.0f} MiB")


if __name__ == "__main__":
    ours = importlib.metadata.version("openrlhf")
    print(f"openrlhf {ours} transformers {transformers.__version__} torch {torch.__version__}")
    {"actor": actor, "reward": reward, "memory": memory}[sys.argv[1]](*sys.argv[2:])

"""Tokenizer and small causal language models of the skill world.

A prompt is one token for each fixed phrase and one for each character of its arguments, a response one token for each
character, so that a chat of the world has about ten tokens and a minute of training on a CPU sees half a million.
"""

from __future__ import annotations

import re
import string
from typing import TYPE_CHECKING, Literal

from stable_rlhf.system.extras import require
from stable_rlhf.world.skills import skills_of, template_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PAD, BOS, EOS, UNK, SEP = "<pad>", "<bos>", "<eos>", "<unk>", "<sep>"

CHARACTERS = string.ascii_lowercase + string.ascii_uppercase + string.digits + " "
"""Characters with a token of their own; any other one outside the phrases is ``<unk>``."""

CONTEXT = 64  # tokens; models of `build_model` take it over
Architecture = Literal["llama", "bloom"]

# A chat without its last turn is a prefix of the chat with it, and the generation prompt is the text between the two.
_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{ sep_token + message['content'] + eos_token }}"
    "{%- else -%}{{ bos_token + message['content'] }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ sep_token }}{%- endif -%}"
)


def build_tokenizer(forget_set: str = "strong") -> PreTrainedTokenizerFast:
    """The tokenizer of a world (`skills_of`): a word-level one of the tokenizers library with a chat template.

    ``decode(encode(text)) == text`` for every text of `CHARACTERS` and template phrases: no spaces are added or cleaned
    up. Texts get no special tokens by themselves, those come from the chat template:
    ``<bos>`` prompt ``<sep>`` response ``<eos>``. It saves and loads with `transformers.AutoTokenizer`.
    """
    require("a generated world's model", "transformers")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    skills = skills_of(forget_set).values()
    pieces = {piece for skill in skills for template in skill.templates for piece in template_pieces(template)}
    # Longest first: an alternation takes the first branch that matches, and one phrase may begin another.
    phrases = sorted(pieces - set(CHARACTERS), key=lambda piece: (-len(piece), piece))
    vocabulary = {token: index for index, token in enumerate([PAD, BOS, EOS, UNK, SEP, *CHARACTERS, *phrases])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Split(
        Regex("|".join([*map(re.escape, phrases), r"[\s\S]"])), behavior="isolated"
    )
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        sep_token=SEP,
        chat_template=_CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int = 64,
    num_hidden_layers: int = 3,
    num_attention_heads: int = 4,
    initializer_range: float = 0.08,
    seed: int = 0,
    architecture: Architecture = "llama",
) -> PreTrainedModel:
    """A small causal language model with random weights for the tokenizer's vocabulary and context.

    Args:
        tokenizer: gives vocabulary size, context and the ids of the special tokens.
        hidden_size: width of the residual stream; a multiple of twice ``num_attention_heads``.
        num_hidden_layers: number of blocks.
        num_attention_heads: heads per block.
        initializer_range: deviation of the initial weights. transformers' 0.02 suits widths of thousands; at a width of
            64 larger weights start faster.
        seed: of the weights; the global generator is left as it was.
        architecture: "llama" (rotary positions, SwiGLU of three times the width) or "bloom" (ALiBi, tied embeddings).

    Returns:
        ``LlamaForCausalLM`` or ``BloomForCausalLM`` in float32 and in evaluation mode, as from_pretrained gives it.

    Raises:
        ValueError: another architecture, or a width that the heads do not divide.
    """
    import torch
    from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

    if hidden_size % (2 * num_attention_heads):
        raise ValueError(
            f"hidden_size must be a multiple of 2 * num_attention_heads = {2 * num_attention_heads}, got {hidden_size}"
        )
    shared = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "initializer_range": initializer_range,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model: PreTrainedModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == "llama":
            model = LlamaForCausalLM(
                LlamaConfig(
                    intermediate_size=3 * hidden_size,
                    num_hidden_layers=num_hidden_layers,
                    num_attention_heads=num_attention_heads,
                    max_position_embeddings=tokenizer.model_max_length,
                    **shared,
                )
            )
        elif architecture == "bloom":
            model = BloomForCausalLM(BloomConfig(n_layer=num_hidden_layers, n_head=num_attention_heads, **shared))
        else:
            raise ValueError(f"architecture must be 'llama' or 'bloom', got {architecture!r}")
    return model.eval()

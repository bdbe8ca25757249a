"""A byte tokenizer and a tiny random Llama, for tests of training."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def toy_tokenizer(chat: str | None = CHAT) -> PreTrainedTokenizerFast:
    """One token a byte, one merge ("th"), the specials <|end|> (EOS) and <|pad|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "th"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = chat
    return tokenizer


def toy_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Two layers of width 32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=264,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=257,
            pad_token_id=258,
        )
        return LlamaForCausalLM(config).to(dtype)


def save_toy(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Model and tokenizer in a folder, as from_pretrained reads them."""
    toy_model(dtype=dtype).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder

"""A byte tokenizer and a tiny random Llama, for tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
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


def toy_model(seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> LlamaForCausalLM:
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
            **settings,
        )
        return LlamaForCausalLM(config).to(dtype)


def save_toy(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Model and tokenizer in a folder, as from_pretrained reads them."""
    toy_model(dtype=dtype).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def write_gguf(file: Path, model: LlamaForCausalLM, architecture: str = "llama") -> Path:
    """The model and the toy tokenizer as llama.cpp would write them, in float32."""
    config, tokenizer = model.config, toy_tokenizer()
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("Toy")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens += [(f"<|unused {i}|>", i) for i in range(len(tokens), config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([3 if token.startswith("<|") else 1 for token, _ in tokens])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(257)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # llama.cpp keeps the halves of a rotary pair side by side
            weight = weight.view(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        target = names.get_name(name.removesuffix(".weight"))
        assert target is not None
        writer.add_tensor(f"{target}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file

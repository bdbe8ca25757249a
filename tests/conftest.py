"""What every test may use: a small random Llama, and the small real model."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

# Before anything imports torch or the hub's client, which read these once; test processes run side by side.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from transformers import LlamaConfig, LlamaForCausalLM

from intarsia import pretrained
from skilled import Skilled, make_skilled

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job ignores Ctrl-C, and so would every program that a test starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("intarsia", deadline=None)  # a loaded machine is slow, not wrong
settings.load_profile("intarsia")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever asks for the real model carries its marker, so that ``-m "not model"`` needs no care."""
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker("model")


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """torch's global generator starts alike in every test, whatever ran before."""
    torch.manual_seed(0)


def _tiny_llama(
    dtype: torch.dtype = torch.float32, layers: int = 2, *, seed: int = 0, **settings: Any
) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        **settings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """Makes random Llamas: ``tiny_llama(dtype, layers, seed=0, **config)``.

    Width 64, 4 heads over 2 key-value heads, MLP 128, 320 tokens; the same seed gives the same weights.
    """
    return _tiny_llama


@pytest.fixture(scope="session")
def skilled(tmp_path_factory: pytest.TempPathFactory) -> Skilled:
    """A tiny base, two trained adapters and rows of their skills. One for all tests of a process: nothing of it is written to."""
    return make_skilled(tmp_path_factory.mktemp("skilled"))


@pytest.fixture(scope="session")
def smollm2() -> pretrained.Pretrained:
    """SmolLM2-135M-Instruct in bfloat16. One for all tests of a process: leave it as you found it."""
    return pretrained.load("smollm2-135m")

"""A small decoder that knows several tasks, for what stands before its tokens to choose among them.

Task k counts on in steps of k, around a circle of numbers: 4 6 8 10 for k = 2. In training the word of the task stands in front; without it the second
number cannot be known, and every later one can be.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia import model as models
from intarsia.method import Method

NUMBERS, KNOWN, NEW, LENGTH = 11, (1, 2, 3, 4), 5, 6  # tasks 1 to 4 are known, 5 is not; numbers of a text


def texts(step: int, rows: int, seed: int) -> Tensor:
    """(rows, LENGTH) numbers of a task, each row from another first one."""
    first = torch.randint(NUMBERS, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return (first + step * torch.arange(LENGTH)) % NUMBERS


def loss(net: nn.Module, tokens: Tensor) -> Tensor:
    """Nats a number, the first one apart; of a word in front nothing is asked either."""
    logits = net(tokens[:, :-1])
    count = LENGTH - 1
    return F.cross_entropy(logits[:, -count:].flatten(0, 1), tokens[:, -count:].flatten())


class Decoder(nn.Module):
    """GPT-2 of two layers, width 32, and a head."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2Model

        off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        words = NUMBERS + len(KNOWN)
        config = GPT2Config(
            vocab_size=words,
            n_positions=32,
            n_embd=32,
            n_layer=2,
            n_head=2,
            bos_token_id=None,
            eos_token_id=None,
            **off,
        )
        self.decoder, self.head = GPT2Model(config), nn.Linear(32, NUMBERS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.decoder(tokens, use_cache=False).last_hidden_state)  # type: ignore[no-any-return]


@functools.cache
def _trained() -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Decoder().double()
    _train(net, list(net.parameters()), 3e-3, 300, lambda step: torch.cat([_with_word(k, step) for k in KNOWN]))
    return net.state_dict()


def _with_word(k: int, step: int) -> Tensor:
    rows = texts(k, 16, 10_000 * k + step)
    return torch.cat([torch.full((len(rows), 1), NUMBERS + KNOWN.index(k)), rows], 1)


def _train(net: nn.Module, trained: list[nn.Parameter], lr: float, steps: int, batch: Any) -> None:
    optimizer = torch.optim.Adam(trained, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss(net, batch(step)).backward()
        optimizer.step()
        schedule.step()


def base() -> Decoder:
    """The decoder that knows the tasks by their words."""
    net = Decoder().double()
    net.load_state_dict(_trained())
    return net


def held_out(task: int, method: Method | None = None, lr: float | None = None, steps: int = 150) -> float:
    """Nats a number of texts without a word, of the base or after training an adapter on others of them."""
    net = base()
    if method is not None:
        models.attach(net, method)
        trained = [p for p in net.parameters() if p.requires_grad]
        _train(net, trained, method.default_lr if lr is None else lr, steps, lambda step: texts(task, 16, step))
    with torch.no_grad():
        return float(loss(net.eval(), texts(task, 200, 99_999)))

"""A net of three small layers, an input and a loss: what the tests of the core work on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import intarsia as ia
from intarsia import chain
from intarsia import model as models

SITES = ("up", "down", "again")  # 24 x 16, 16 x 24, 24 x 16


def small_net(dtype: torch.dtype = torch.float32, bias: bool = True, seed: int = 0) -> nn.Sequential:
    """up, tanh, down, tanh2, again; the same seed gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(16, 24, bias), nn.Linear(24, 16, bias), nn.Linear(16, 24, bias)]
    net = nn.Sequential()
    for name, layer in zip(SITES, layers, strict=True):
        net.add_module(name, layer)
        net.add_module(f"tanh_{name}", nn.Tanh())
    return net.to(dtype)


def some_input(dtype: torch.dtype = torch.float32, *shape: int, seed: int = 1) -> Tensor:
    """Standard normal numbers, (4, 3, 16) unless told otherwise."""
    return torch.randn(shape or (4, 3, 16), generator=torch.Generator().manual_seed(seed)).to(dtype)


def some_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """A loss with gradients of about one everywhere."""
    y: Tensor = model(batch)
    return (y.double() - 0.3).square().mean()


def stir(model: nn.Module, name: str = "default", seed: int = 0, size: float = 0.02) -> None:
    """Move every trained number of an adapter: at the start, where nothing was learned, most mistakes are hidden."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for state in models.states(model, name).values():
            for parameter in state.parameters():
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    ia.sync(model)


def adapted(method: ia.Method, dtype: torch.dtype = torch.float32, **given: Any) -> nn.Sequential:
    """A small net with a stirred adapter on every layer."""
    model = small_net(dtype)
    ia.attach(model, method, data=[some_input(dtype)], loss=some_loss, **given)
    stir(model, given.get("name", "default"))
    return model


def layer_of(model: nn.Module, name: str) -> Any:
    """A layer with whatever an adapter gave it."""
    return model.get_submodule(name)


def state_of(model: nn.Module, site: str, name: str = "default") -> Any:
    """The state of an adapter at a site, its tensors as attributes."""
    return models.states(model, name)[site]


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer is given."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@contextmanager
def beside_the_base(model: nn.Module) -> Iterator[None]:
    """Within the block nothing is live: every adapter computes in its branch."""
    layers = chain.adapted_layers(model).values()
    for layer in layers:
        chain.set_active(layer, layer.active, live=False)
    yield
    for layer in layers:
        chain.set_active(layer, layer.active)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what stands in the weights now."""
    return {name: layer_of(model, name).weight.detach().clone() for name in SITES}

"""Several processes: how many there are, which one this is, what the first does for all, and whole tensors of shards.

Everything here also holds where there is one process, without ``torch.distributed`` being imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from intarsia.errors import ElsewhereError

T = TypeVar("T")


def started() -> bool:
    """Whether processes work together now."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def count() -> int:
    """How many processes there are."""
    return torch.distributed.get_world_size() if started() else 1


def rank() -> int:
    """Which of them this is; 0 writes files and prints."""
    return torch.distributed.get_rank() if started() else 0


def launched() -> bool:
    """Whether a launcher (torchrun, accelerate launch) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def leave() -> None:
    """Take leave of the other processes; nothing after this may need them."""
    if started():
        torch.distributed.destroy_process_group()


def device() -> torch.device | None:
    """Where this process of several computes by default: its own CUDA device, or None for the CPU."""
    if not torch.cuda.is_available():
        return None
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def first_does(act: Callable[[], T]) -> T:
    """``act()`` in the first process alone. All get its result, or its IntarsiaError; every process must call this.

    The result is handed over by pickle, between processes of one run.
    """
    if count() == 1:
        return act()
    told: list[Any] = [None, None]
    failure: BaseException | None = None
    if rank() == 0:
        try:
            told = [act(), None]
        except BaseException as error:
            failure, told = error, [None, str(error) or type(error).__name__]
    torch.distributed.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    if told[1] is not None:
        raise ElsewhereError(told[1])
    return told[0]  # type: ignore[no-any-return]


def first_then_all(act: Callable[[], T]) -> T:
    """``act()`` in the first process, then in all others: the first makes what the others find, such as a cached file."""
    if count() == 1:
        return act()
    made: list[T] = []
    first_does(lambda: made.append(act()))
    return made[0] if made else act()


@contextmanager
def first_within(context: AbstractContextManager[T]) -> Iterator[T]:
    """``with context`` in the first process; the others get what it gives, and wait for its entering and leaving."""
    if count() == 1:
        with context as given:
            yield given
        return
    with ExitStack() as stack:
        yield first_does(lambda: stack.enter_context(context))
        first_does(stack.close)


def all_do(act: Callable[[], None]) -> None:
    """``act()`` in every process; where it fails in one, it fails in all."""
    failure: Exception | None = None
    try:
        act()
    except Exception as error:
        failure = error
    reasons = [reason for reason in gathered(failure and (str(failure) or type(failure).__name__)) if reason]
    if failure is not None:
        raise failure
    if reasons:
        raise ElsewhereError(reasons[0])


def gathered(value: T) -> list[T]:
    """Every process's value, in their order; by pickle. Every process must call this."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    torch.distributed.all_gather_object(values, value)
    return values


def summed(*numbers: float) -> list[float]:
    """The sums over all processes, in float64. Every process must call this."""
    return _reduced(numbers, "SUM")


def most(number: int) -> int:
    """The greatest of all processes' numbers. Every process must call this."""
    return int(_reduced([number], "MAX")[0])


def _reduced(numbers: Sequence[float], how: str) -> list[float]:
    if count() == 1:
        return list(numbers)
    place = "cpu" if torch.distributed.get_backend() == "gloo" else device()
    total = torch.tensor(numbers, dtype=torch.float64, device=place)
    torch.distributed.all_reduce(total, getattr(torch.distributed.ReduceOp, how))
    return total.tolist()


def wait() -> None:
    """Until every process is here."""
    gathered(None)


def is_shard(tensor: Tensor) -> bool:
    """Whether a process holds only its part of this tensor (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` has been called on the module itself or on one in it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever shards has imported it
    return fsdp is not None and any(isinstance(m, fsdp.FSDPModule) for m in module.modules())


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of it where it is a shard; then every process must call this."""
    full = getattr(tensor, "full_tensor", None)
    return full() if full else tensor

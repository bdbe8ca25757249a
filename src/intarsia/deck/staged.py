"""Writing on a GPU from plans that lie in the host's memory: of many adapters at hand only what is wanted next takes device memory.

Plans are kept in pinned memory, from which a GPU copies by itself. What a switch needs goes over on a stream of its own,
beside whatever the model computes; :meth:`Staged.fetch` (by ``Deck.prefetch``) has it sent beforehand. The writing itself is
in the order of the current stream, so that a forward pass begun earlier still reads the old bits.

On the CPU the same steps run without pinned memory and streams: there the tests run them.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from intarsia.deck.plan import Passage, size_of
from intarsia.deck.weights import Weights
from intarsia.deck.writer import Prepared, Torch, Writer, put_all

Step = tuple[str, int, Tensor, Tensor]  # weight, length of its runs, index, bits

ROOM = 2**28  # bytes of device memory for what was sent over; the last one stays in any case


@dataclass(frozen=True, eq=False)
class _Sent:
    """A passage on its weights' device. ``arrived``: an event of the stream that it was copied on."""

    prepared: Prepared
    steps: tuple[Step, ...]
    bytes: int
    arrived: Any


class Staged(Writer):
    """``index_copy_`` on each weight's memory, from the host's memory by way of a few places on the device."""

    name = "staged"

    def __init__(self, room: int = ROOM) -> None:
        self.room = room
        self._sent: OrderedDict[int, _Sent] = OrderedDict()
        self._streams: dict[torch.device, Any] = {}

    def index_dtype(self, W: Tensor, run: int) -> torch.dtype:
        # Half of the bytes that have to go over; they are widened where they arrive.
        return torch.int32 if W.numel() // run < 2**31 else torch.int64

    def keep(self, tensor: Tensor) -> Tensor:
        host = tensor.cpu()
        return host.pin_memory() if tensor.device.type == "cuda" else host

    def prepare(self, passage: Passage, weights: Weights) -> Prepared:
        made = Torch().prepare(passage, weights)
        steps = tuple(
            (name, run, self._pinned(index, weights[name]), self._pinned(bits, weights[name]))
            for name, run, index, bits in made.work
        )
        devices = {name: weights[name].device for name, *_ in steps}
        return Prepared(made.copies, (steps, devices), made.bytes, made.load)

    def fetch(self, prepared: Prepared) -> None:
        self._send(prepared)

    def write(self, prepared: Prepared, weights: Weights) -> None:
        sent = self._send(prepared)
        for event in sent.arrived:
            torch.cuda.current_stream(event.device).wait_event(event)
        put_all(sent.steps, weights)
        for _, _, index, bits in sent.steps:
            if index.is_cuda:  # their memory is not given to another before this stream is done with it
                for tensor in (index, bits):
                    tensor.record_stream(torch.cuda.current_stream(index.device))

    # ------------------------------------------------------------------ over to the device
    def _send(self, prepared: Prepared) -> _Sent:
        found = self._sent.get(id(prepared))
        if found is not None and found.prepared is prepared:
            self._sent.move_to_end(id(prepared))
            return found
        steps, devices = prepared.work
        streams = {device: self._stream(device) for device in devices.values() if device.type == "cuda"}
        moved = []
        for name, run, index, bits in steps:
            device = devices[name]
            with torch.cuda.stream(streams[device]) if device in streams else nullcontext():
                over = index.to(device, non_blocking=True).long(), bits.to(device, non_blocking=True)
            moved.append((name, run, *over))
        sent = _Sent(
            prepared,
            tuple(moved),
            sum(size_of(index) + size_of(bits) for _, _, index, bits in moved),
            tuple(stream.record_event() for stream in streams.values()),
        )
        self._sent[id(prepared)] = sent
        while len(self._sent) > 1 and sum(one.bytes for one in self._sent.values()) > self.room:
            self._sent.popitem(last=False)
        return sent

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    @staticmethod
    def _pinned(tensor: Tensor, weight: Tensor) -> Tensor:
        return tensor.pin_memory() if weight.device.type == "cuda" and not tensor.is_pinned() else tensor

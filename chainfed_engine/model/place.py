"""Where a model computes: the CPU or one CUDA device, and what a native call needs to know of a tensor's place.

`Place` is made once from the text of `[train] device` and handed down; tensors decide where a native call runs, so that
nothing below needs to be told twice. Batches, embeddings and cached records stay on the CPU; hidden states, masks,
adapters and everything with a gradient are on the place.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from chainfed_engine import native
from chainfed_engine.errors import UnsupportedHardware
from chainfed_engine.types import Batch


@dataclass(frozen=True)
class Place:
    """`index` None: the CPU. `is_unified`: the device shares the CPU's memory (Jetson boards).

    `library_from_tokens`: as `native.cuda_device` says.
    """

    index: int | None = None
    is_unified: bool = False
    library_from_tokens: int | None = None

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu") if self.index is None else torch.device("cuda", self.index)

    @property
    def is_cuda(self) -> bool:
        return self.index is not None


CPU = Place()


def find_place(text: str) -> Place:
    """The place named "cpu", "cuda" (the first device) or "cuda:1" (as the configuration checks it), after asking the
    core and torch for it.

    Raises UnsupportedHardware when this build, this torch or the driver has no CUDA, or no code for the device's
    architecture; InvalidArgument for the number of a device that is not there.
    """
    if text == "cpu":
        return CPU
    index = int(text.partition(":")[2] or 0)
    info = native.cuda_device(index)
    if not torch.cuda.is_available():
        raise UnsupportedHardware(
            f"[train] device: torch {torch.__version__} has no CUDA for {info['name']}; install the build of "
            'torch that belongs to this driver (for Jetson: NVIDIA\'s own), or set device = "cpu"'
        )
    return Place(index, bool(info["is_unified"]), info["library_from_tokens"])


def device_of(tensor: Tensor) -> int | None:
    """The number of the tensor's CUDA device, None for the CPU: the `device` of the native workspace functions."""
    return tensor.device.index if tensor.is_cuda else None


def stream_of(tensor: Tensor) -> int:
    """The address of the current stream of the tensor's device, 0 for the CPU: the `stream` of native calls."""
    return int(torch.cuda.current_stream(tensor.device).cuda_stream) if tensor.is_cuda else 0


def batch_on(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; the same batch where they are there already."""
    if batch.attention_mask.device == device:
        return batch

    def move(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.to(device, non_blocking=True)

    return replace(
        batch,
        input_ids=move(batch.input_ids),
        attention_mask=move(batch.attention_mask),
        labels=move(batch.labels),
        token_type_ids=move(batch.token_type_ids),
    )

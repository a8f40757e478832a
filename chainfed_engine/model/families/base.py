"""What a family must say so that its layers can be run one at a time from a store.

Enters: a Hugging Face config (as the dict in `store.json`). Leaves: the library's own modules on the meta device
(shapes without weights: the caller fills or replaces every parameter) and, for a pass over a batch, the `LayerContext`
that all layers share. B sequences, T positions padded on the right, D hidden. A family holds no weights and no state.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from chainfed_engine.errors import InvalidArgument, UnsupportedModel
from chainfed_engine.types import Batch

Pooling = Literal["mean", "first", "last"]
Config = Any  # transformers' PreTrainedConfig of the family


@dataclass(frozen=True)
class LayerContext:
    """`masks`: by kind of attention, bool, True = may attend, [B,1,1,T] or [1,1,T,T], or None: the attention's own rule
    (all positions, or causal) is the whole mask. `rotary`: cos and sin [1,T,head_dim] for decoders, else None."""

    masks: Mapping[str, Tensor | None]
    rotary: tuple[Tensor, Tensor] | None

    def to(self, device: torch.device) -> "LayerContext":
        masks = {kind: None if mask is None else mask.to(device) for kind, mask in self.masks.items()}
        rotary = None if self.rotary is None else (self.rotary[0].to(device), self.rotary[1].to(device))
        return LayerContext(masks, rotary)


class Family(ABC):
    """One architecture. Methods that build modules return them on the meta device, in evaluation mode."""

    model_type: ClassVar[str]
    config_class: ClassVar[type[Any]]
    required: ClassVar[Mapping[str, object]]  # config values without which the modules would run as another model
    lora_targets: ClassVar[tuple[str, ...]]  # query and value projection, relative to the layer
    pooling: ClassVar[Pooling]  # what the family's own sequence classifier reads
    transform_activation: ClassVar[Literal["tanh", "relu"] | None]  # of the classifier's transform; None: no transform
    classifier_bias: ClassVar[bool] = True  # whether the library's classification head has one
    is_pre_norm: ClassVar[bool] = False  # rows grow from layer to layer; a norm before each part and the head divides

    def config(self, values: Mapping[str, Any]) -> Config:
        """The library's config of `values`, set to scaled-dot-product attention. Raises UnsupportedModel."""
        if values.get("model_type", self.model_type) != self.model_type:
            raise UnsupportedModel(f"config: expected model_type {self.model_type!r}, got {values['model_type']!r}")
        for key, value in self.required.items():
            if values.get(key, value) != value:
                raise UnsupportedModel(
                    f"{self.model_type} with {key} = {values[key]!r}: the engine runs {value!r} alone"
                )
        try:
            config = self.config_class(**{key: value for key, value in values.items() if key != "model_type"})
        except Exception as error:  # the library's validators raise many kinds, some straight from Exception
            raise UnsupportedModel(f"config: transformers refuses it: {' '.join(str(error).split())[:300]}") from error
        config._attn_implementation = "sdpa"
        config.chunk_size_feed_forward = 0  # a way to save memory that demands lengths divisible by it
        return config

    @abstractmethod
    def layer(self, config: Config, index: int) -> nn.Module: ...

    @abstractmethod
    def embeddings(self, config: Config) -> nn.Module:
        """The module that turns word rows into the first layer's input; it has no word table."""

    @abstractmethod
    def embed(self, config: Config, module: nn.Module, words: Tensor, batch: Batch) -> Tensor:
        """Word rows [B,T,D] of `batch.input_ids` -> the first layer's input [B,T,D]."""

    @abstractmethod
    def final_norm(self, config: Config) -> nn.Module | None: ...

    @abstractmethod
    def attention_kind(self, config: Config, index: int) -> str:
        """The key of layer `index` in `LayerContext.masks`."""

    @abstractmethod
    def context(self, config: Config, tokens: Tensor) -> LayerContext:
        """What the layers share in a pass; `tokens`: bool [B,T], True = token, as `checked_mask` gives it."""


class _NoInit(TorchFunctionMode):
    """Leaves out `torch.nn.init` and what else on the meta device runs through torch's reference code in Python, which
    imports the compiler and symbolic algebra: there is nothing to fill."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init" or function is Tensor.fill_:
            return args[0] if args else named["tensor"]
        if function is torch.arange:  # position ids, which the caller deletes
            named = {**named, "device": "cpu"}
        return function(*args, **named)


def without_weights(build: Any) -> nn.Module:
    """Call `build` on the meta device and switch the module to evaluation mode with frozen parameters.

    Raises UnsupportedModel when the library cannot build it: an unknown activation, heads that do not divide the size.
    """
    try:
        with torch.device("meta"), _NoInit():
            module: nn.Module = build()
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModel(f"config: transformers cannot build the layer: {str(error)[:300]}") from error
    return module.eval().requires_grad_(False)


def checked_mask(batch: Batch, max_positions: int) -> Tensor:
    """The attention mask as bool [B,T] after checking what every family relies on; raises InvalidArgument.

    Right padding is what makes a causal pass independent of the padding, so that no [B,1,T,T] mask is ever needed.
    """
    ids, mask = batch.input_ids, batch.attention_mask
    if ids.ndim != 2 or ids.shape != mask.shape or 0 in ids.shape:
        raise InvalidArgument(
            f"batch: expected input_ids and attention_mask of one shape [B, T], got {list(ids.shape)} and "
            f"{list(mask.shape)}"
        )
    if ids.shape[1] > max_positions:
        raise InvalidArgument(
            f"batch: {ids.shape[1]} tokens a sequence, but the model has positions for {max_positions}; truncate the "
            f"text ([train] sequence_length = {max_positions} or less)"
        )
    tokens = mask.bool()
    if not bool(tokens[:, 0].all()) or bool((tokens[:, 1:] & ~tokens[:, :-1]).any()):
        raise InvalidArgument(
            "batch: expected sequences of at least one token, padded on the right; set the tokeniser's padding_side "
            "to 'right'"
        )
    return tokens

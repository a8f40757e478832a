"""A frozen model whose layers live in a layer store: `FrozenModel`, `FrozenLayer`, `FrozenHead`.

batch -> embed -> [B,T,D] -> layers -> [B,T,D] -> final norm -> head or classifier. A layer is the library's module with
every linear replaced by a `FrozenLinear`; its small parameters (norms, biases) are copied in when it is bound to a
layer of the store. The prefix shares one skeleton, bound to layer after layer; a layer of the window keeps its own.
Embeddings are computed on the CPU, all else on the store's place.
B sequences, T positions padded on the right, D hidden, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from chainfed_engine import native
from chainfed_engine.errors import CorruptFile, InvalidArgument
from chainfed_engine.model.classifier import Classifier
from chainfed_engine.model.families import chosen_pooling, family
from chainfed_engine.model.families.base import Config, Family, LayerContext, Pooling, checked_mask
from chainfed_engine.model.layout import is_quantised
from chainfed_engine.model.linear import Activation, Binding, Compute, FrozenLinear, LowRank
from chainfed_engine.model.store import LayerStore, Shard, decoded, like
from chainfed_engine.types import Batch, ModelShape


class LayerAdapter(Protocol):
    """What a layer knows of an adapter: `low_rank` acts inside it (by path of a projection), the call on its output."""

    @property
    def low_rank(self) -> Mapping[str, LowRank]: ...
    def __call__(self, hidden: Tensor) -> Tensor: ...


class FrozenLayer(nn.Module):
    """`forward(hidden [B,T,D], context, adapter=None) -> hidden [B,T,D]`; differentiable in hidden and the adapter."""

    def __init__(self, kind: Family, config: Config, store: LayerStore, compute: Compute, index: int) -> None:
        super().__init__()
        self.kind, self.config, self.store = kind, config, store
        self.module = kind.layer(config, index)
        self.linears: dict[str, FrozenLinear] = {}
        for name, linear in [(n, m) for n, m in self.module.named_modules() if isinstance(m, nn.Linear)]:
            frozen = FrozenLinear(linear.in_features, linear.out_features, linear.bias is not None, compute)
            self.linears[name] = frozen
            self.module.set_submodule(name, frozen)
        for name, parameter in list(self.module.named_parameters()):
            set_parameter(self.module, name, torch.empty(parameter.shape, device=compute.device))
        self.bind(index)

    def bind(self, index: int) -> None:
        """Become layer `index` of the store. Graphs built before keep their weights, not their norms and biases."""
        self.index, self.file = index, self.store.layer_file(index)
        self.attention_kind = self.kind.attention_kind(self.config, index)
        where = f"{self.store.info.layers[index].path}"
        small: dict[str, Tensor] = dict(self.module.named_parameters())
        with self.store.lease(self.file) as lease, torch.no_grad():
            for name, linear in self.linears.items():
                _check_sizes(lease.matrix(f"{name}.weight"), linear, f"{where}: {name}.weight")
                linear.bind(Binding(self.store, self.file, f"{name}.weight"))
                if linear.bias is not None:
                    small[f"{name}.bias"] = linear.bias
            for name, value in small.items():
                value.copy_(like(decoded(lease, name), value, f"{where}: {name}"))

    def forward(self, hidden: Tensor, context: LayerContext, adapter: LayerAdapter | None = None) -> Tensor:
        """Float32 [B, T, D] to the same, through the layer and, where there is one, its adapter."""
        arguments = {} if context.rotary is None else {"position_embeddings": context.rotary}
        # The lease keeps the layer in its slot from the first linear to the last.
        with self.store.weights(self.file), self._with_inside(adapter):
            hidden = self.module(hidden, attention_mask=context.masks[self.attention_kind], **arguments)
        return hidden if adapter is None else adapter(hidden)

    def train(self, mode: bool = True) -> "FrozenLayer":
        """Stay in evaluation mode whatever a surrounding module switches to: frozen layers have no dropout."""
        super().train(False)
        return self

    @contextmanager
    def _with_inside(self, adapter: LayerAdapter | None) -> Iterator[None]:
        branches = {} if adapter is None else adapter.low_rank
        for name, branch in branches.items():
            if name not in self.linears:
                raise InvalidArgument(f"adapter on {name!r}: the layer's linears are {', '.join(self.linears)}")
            self.linears[name].low_rank = branch
        try:
            yield
        finally:
            for name in branches:
                self.linears[name].low_rank = None


class FrozenHead:
    """The LM head, V rows in shards that are leased one after another. `block_format` is that of every shard."""

    def __init__(self, store: LayerStore, compute: Compute) -> None:
        self._store, self._compute = store, compute
        self.activation: str = compute.activation
        self.block_format: str = store.info.head_format
        self.num_rows = store.info.shape.vocab_size
        self.max_shard_rows = max(shard.num_rows for shard in store.head_shards)

    def shards(self) -> Iterator[tuple[native.Matrix, int]]:
        """(matrix [num_rows, D], first row) of every shard in order; a matrix is valid until the next is asked for."""
        shards = self._store.head_shards
        for position, shard in enumerate(shards):
            with self._store.weights(shard.file) as lease:
                if position + 1 < len(shards):
                    self._store.prefetch(shards[position + 1].file)
                yield lease.matrix("head.weight"), shard.first_row

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """f32 [M,D] -> [M,V]: for a few rows (generation, checks); training uses the loss without logits."""
        return torch.cat([self._linear(shard)(hidden) for shard in self._store.head_shards], dim=-1)

    def _linear(self, shard: Shard) -> FrozenLinear:
        linear = FrozenLinear(self._store.info.shape.hidden_size, shard.num_rows, False, self._compute)
        linear.bind(Binding(self._store, shard.file, "head.weight"))
        return linear


class FrozenModel:
    """The base model of a run. `activation`: "int8" (integer dots, the default for quantised stores) or "f32".

    `head` is None for a model without an LM head. Raises UnsupportedModel for an architecture or a variant that the
    engine does not run, CorruptFile when the store does not hold what its config promises.
    """

    def __init__(self, store: LayerStore, activation: Activation | None = None) -> None:
        info = store.info
        native.set_num_threads(torch.get_num_threads())  # one setting for both pools, the user's
        self.store = store
        self.activation: Activation = activation or ("int8" if is_quantised(info.block_format) else "f32")
        self.family = family(info.architecture)
        self.config = self.family.config(info.config)
        self.shape: ModelShape = info.shape
        self.device = store.place.torch_device
        self._compute = Compute(self.activation, self.device)
        self._skeleton: FrozenLayer | None = None
        self._embeddings = self._filled(self.family.embeddings(self.config), prefix="")
        norm = self.family.final_norm(self.config)
        self._norm = None if norm is None else self._filled(norm, prefix="norm.").to(self.device)
        self.head = FrozenHead(store, self._compute) if store.head_shards else None

    @property
    def num_layers(self) -> int:
        return self.shape.num_layers

    @property
    def fingerprint(self) -> str:
        return self.store.fingerprint

    @property
    def record_key(self) -> str:
        """What the bits of this model's hidden states depend on, beside adapters and samples: kinds of device sum in
        other orders."""
        place = "" if self.device.type == "cpu" else f" {self.device.type}"
        return f"{self.fingerprint} {self.activation}{place}"

    @property
    def is_pre_norm(self) -> bool:
        """Whether a norm stands between the last layer and the head, which makes the head blind to a row's length."""
        return self.family.is_pre_norm

    @torch.no_grad()
    def embed(self, batch: Batch) -> Tensor:
        """The first layer's input, f32 [B,T,D]. Raises InvalidArgument: padding, length, or an id out of range."""
        checked_mask(batch, self.shape.max_positions)
        words = self.store.word_rows(batch.input_ids.reshape(-1)).view(*batch.input_ids.shape, -1)
        return self.family.embed(self.config, self._embeddings, words, batch).to(self.device)

    def context(self, batch: Batch) -> LayerContext:
        """What all layers share in a pass over the batch; reads `attention_mask` alone."""
        context = self.family.context(self.config, checked_mask(batch, self.shape.max_positions))
        return context if self.device.type == "cpu" else context.to(self.device)

    def layer(self, index: int) -> FrozenLayer:
        """Layer `index` with small parameters of its own, for the window."""
        return FrozenLayer(self.family, self.config, self.store, self._compute, index)

    @torch.no_grad()
    def run_layer(
        self, index: int, hidden: Tensor, context: LayerContext, adapter: LayerAdapter | None = None
    ) -> Tensor:
        """Layer `index` (and its adapter) without gradient: [B,T,D] -> [B,T,D]; the next layer is read meanwhile."""
        if self._skeleton is None:
            self._skeleton = self.layer(index)
        with self.store.weights(self.store.layer_file(index)):
            if index + 1 < self.num_layers:
                self.store.prefetch_layer(index + 1)
            if self._skeleton.index != index:
                self._skeleton.bind(index)
            return self._skeleton(hidden, context, adapter)  # type: ignore[no-any-return]

    def final_norm(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D]: the norm before the head; the identity where the architecture has none."""
        return hidden if self._norm is None else self._norm(hidden)

    def new_classifier(self, num_labels: int, pooling: Pooling | str = "auto", *, seed: int = 0) -> Classifier:
        """The checkpoint's own head, whole, if it has as many labels and reads the same position; else a seeded linear.

        `pooling` "auto": as the store says, else as the family's own classifier does.
        """
        chosen = chosen_pooling(pooling, self.store.info.pooling, self.shape.architecture)
        bias = self.family.classifier_bias
        out_weight = self.store.embedding_tensor("classifier.out_weight")
        if out_weight is None or out_weight.shape[0] != num_labels or chosen != self.family.pooling:
            return Classifier(self.shape.hidden_size, num_labels, chosen, bias=bias, seed=seed)
        transform = self.family.transform_activation
        classifier = Classifier(self.shape.hidden_size, num_labels, chosen, transform=transform, bias=bias, seed=seed)
        with torch.no_grad():
            for name, parameter in classifier.named_parameters():
                value = self.store.embedding_tensor(f"classifier.{name}")
                if value is None:
                    raise CorruptFile(f"{self.store.info.embedding.path}: a classification head without {name}")
                parameter.copy_(like(value, parameter, f"classifier.{name}"))
        return classifier

    def _filled(self, module: nn.Module, prefix: str) -> nn.Module:
        """Give every parameter of a module on the meta device its values from the embedding file."""
        for name, parameter in list(module.named_parameters()):
            value = self.store.embedding_tensor(prefix + name)
            what = f"{self.store.info.embedding.path}: {prefix}{name}"
            if value is None:
                raise CorruptFile(f"{what}: missing, but the config promises it; convert the checkpoint again")
            set_parameter(module, name, like(value, parameter, what))
        return module


def set_parameter(module: nn.Module, path: str, value: Tensor) -> None:
    """Replace the parameter at `path` by a frozen one that holds `value`."""
    owner, _, name = path.rpartition(".")
    setattr(module.get_submodule(owner), name, nn.Parameter(value, requires_grad=False))


def _check_sizes(matrix: native.Matrix, linear: FrozenLinear, what: str) -> None:
    if (matrix.num_rows, matrix.num_cols) != (linear.out_features, linear.in_features):
        raise CorruptFile(
            f"{what}: expected [{linear.out_features}, {linear.in_features}] from the config, the store holds "
            f"[{matrix.num_rows}, {matrix.num_cols}]"
        )

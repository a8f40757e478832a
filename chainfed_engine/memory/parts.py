"""What a run holds at once, in bytes, from shapes alone: the weights, and each phase's live set at its largest.

Counts are floats a token that the library's layers keep (saved for the backward pass) or hold (live), read off their
modules and checked against measured peaks (tests/memory). They are exact because the heap gives large blocks back at
once (`lean.py`): what is resident is what is in use. Nothing here opens a file. D hidden size, I intermediate size, A
query width, K key width, M tokens of a micro-batch, n target tokens among them, r adapter size.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from chainfed_engine.config import END_TO_END, FORWARD_ONLY, ChainConfig
from chainfed_engine.memory import closed_form
from chainfed_engine.schedule import num_window_layers
from chainfed_engine.start_layer import start_layers
from chainfed_engine.types import ModelShape, TaskKind

if TYPE_CHECKING:
    from chainfed_engine.memory.device import DeviceFacts

F32, F64 = 4, 8
MIB = 1 << 20
# Beyond what `settle.py` has run before the count: code that only a run reads, thread stacks, its objects. Measured.
WORKING_BYTES = 36 * MIB
HEAP_BYTES = 12 * MIB  # free memory at the top of the heap (8 MiB) and holes between blocks below 1 MiB
HEAD_WORKSPACE_BYTES = 4 * MIB
RESIDENT_FILL_BYTES = (4 * MIB,)  # nothing is read again: small chunks stay in the processor's caches
FREE_SLOTS = 2  # beside pinned window layers: one in use, one being read
BATCH_TOKEN_BYTES = 24  # ids, mask and labels of a batch, int64
# With 4 layers of MiniLM no holes were seen in a heap of large blocks; with 15 of SmolLM2 91 MiB beyond the plan.
SHALLOW_WINDOW = 4


@dataclass(frozen=True)
class StoreSizes:
    """Bytes of a store's files by role; `slot_bytes` is the largest file that goes through the ring."""

    layer_bytes: int
    head_bytes: int
    embedding_bytes: int
    slot_bytes: int
    num_layers: int
    num_head_shards: int

    @property
    def total_bytes(self) -> int:
        return self.layer_bytes + self.head_bytes + self.embedding_bytes


@dataclass(frozen=True)
class Choices:
    """What the planner may decide. `window`: layers that the chain trains at once; `num_slots` None: every file stays
    resident."""

    window: int
    num_slots: int | None
    micro_batch: int
    recompute: bool
    cache_format: Literal["int8", "bf16", "f32"]
    fill_bytes: int
    stand_in_rows: int = 0  # that stand-ins are fitted on, of all clients together; 0: none are fitted
    kept_heap_bytes: int = 0  # freed activations stay with the process up to this; 0: they go back at once


@dataclass(frozen=True)
class DataFacts:
    """What is known of the samples. None: the configuration's largest."""

    longest_tokens: int | None = None  # of a sample
    mean_tokens: float | None = None  # of a training sample
    most_targets: int | None = None  # labelled tokens of a sample (causal LM)
    largest_client_samples: int | None = None
    evaluation_samples: int | None = None
    num_clients: int | None = None
    training_samples: int | None = None
    num_labels: int | None = None
    profile_lengths: tuple[int, ...] | None = None  # the most tokens of any client's longest, second longest ... sample


@dataclass(frozen=True)
class Request:
    """What is to be planned. Measured by the caller before a model is opened: `interpreter_bytes` what the process
    takes, `startup_bytes` the most that it has taken until then."""

    shape: ModelShape
    sizes: StoreSizes
    config: ChainConfig
    task: TaskKind
    interpreter_bytes: int
    data_bytes: int = 0
    facts: DataFacts = field(default_factory=DataFacts)
    device: "DeviceFacts | None" = None  # None: the CPU
    startup_bytes: int = 0  # 0: less than the run will take

    @property
    def tokens(self) -> int:
        """Of the longest sample."""
        longest = self.facts.longest_tokens
        return self.config.sequence_length if longest is None else min(longest, self.config.sequence_length)

    @property
    def targets(self) -> int:
        """Of one sample: rows that the head sees."""
        if self.task != "causal-lm":
            return 1
        return self.tokens if self.facts.most_targets is None else min(self.facts.most_targets, self.tokens)

    @property
    def batch_tokens(self) -> int:
        return self.config.batch_size * self.tokens

    def part_samples(self, choices: Choices) -> int:
        """Of a micro-batch: what every pass through the layers takes at a time, a step's and an evaluation's alike."""
        return min(choices.micro_batch, self.config.batch_size)

    def part_tokens(self, choices: Choices) -> int:
        return self.part_samples(choices) * self.tokens

    @property
    def window_layers(self) -> int:
        """That a step runs with an adapter each."""
        config, num_layers = self.config, self.shape.num_layers
        if config.method == "fedra":
            return min(config.random_layers or -(-num_layers // 2), num_layers)
        if config.method in END_TO_END:
            return num_layers
        return 0 if config.method in ("linear-probe", "none") else min(self.window, num_layers)

    @property
    def window(self) -> int:
        """Of the chain."""
        return num_window_layers(self.config.window, self.shape.num_layers, self.config.start_layer)

    @property
    def start_layers(self) -> range:
        """That the chain may start from."""
        start = self.config.start_layer
        if start is not None:
            return range(start, start + 1)
        return start_layers(self.task, self.shape.num_layers, self.window)


def keeps_deep_graphs(config: ChainConfig, window: int) -> bool:
    """Whether a step keeps the activations of many layers: small blocks among them leave holes in the heap."""
    return config.method in END_TO_END or (config.method in ("chain", "top-window") and window > SHALLOW_WINDOW)


def is_decoder(shape: ModelShape) -> bool:
    return shape.architecture not in ("bert", "roberta", "distilbert")


def saved_floats(shape: ModelShape) -> int:
    """Floats a token that one layer keeps for the backward pass (frozen linears keep none): the inputs of its two
    norms, queries, keys, values and their result, the activation's inputs; a normed query and key (Qwen3) once more."""
    attention, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    if not is_decoder(shape):
        return 2 * shape.hidden_size + 4 * attention + shape.intermediate_size
    normed = attention + keys if shape.architecture == "qwen3" else 0
    return 2 * shape.hidden_size + 2 * attention + 2 * keys + 2 * shape.intermediate_size + normed


def _first_saved_floats(shape: ModelShape) -> int:
    """The same for the first layer with LoRA inside: its input needs no gradient, so a decoder's first norm keeps
    nothing, nor does the norm of the keys (Qwen3). (With bottlenecks nothing in that layer needs a gradient.)"""
    if not is_decoder(shape):
        return saved_floats(shape)
    keys = shape.num_kv_heads * shape.head_dim if shape.architecture == "qwen3" else 0
    return saved_floats(shape) - shape.hidden_size - keys


def adapter_floats(request: Request) -> int:
    """Parameters of one layer's adapter: down and up with their biases, or LoRA's four factors of query and value."""
    shape, rank = request.shape, request.config.adapter_size
    if request.config.adapter == "lora":
        return rank * (2 * shape.hidden_size + shape.num_heads * shape.head_dim + shape.num_kv_heads * shape.head_dim)
    return 2 * rank * shape.hidden_size + shape.hidden_size + rank


def adapter_saved_floats(request: Request) -> int:
    """Floats a token that an adapter keeps for the backward pass: what it reads, and its inner values before and after
    the activation, or of both projections; the bottleneck of a pre-norm model computes the activation again."""
    scaled = is_decoder(request.shape) and request.config.adapter == "bottleneck"
    return request.shape.hidden_size + (1 if scaled else 2) * request.config.adapter_size


def _above_floats(request: Request) -> int:
    """Floats that the adapters above the lowest window keep of a row in the auxiliary branch. Nobody trains them there:
    a plain one keeps its inner values alone, a scaled one its row as well."""
    shape = request.shape
    one = request.config.adapter_size + (shape.hidden_size if is_decoder(shape) else 0)
    above = max(0, shape.num_layers - request.start_layers.start - request.window_layers)
    return one * above * (branches(request) - 1)


def live_floats(shape: ModelShape) -> int:
    """Floats a token that one layer holds at once without a graph, its input and output included: the feed-forward
    part's widest moment, or the attention's."""
    width, attention, keys = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    if is_decoder(shape):
        rotated = 2 * attention + 2 * keys + max(2 * attention, 3 * keys)
        return 2 * width + max(width + 2 * shape.intermediate_size, rotated)
    return max(2 * width + 2 * shape.intermediate_size, 5 * width + shape.intermediate_size, 6 * width)


def _expanded(shape: ModelShape) -> int:
    """Floats of the feed-forward part's widest moment with a graph: the product's gradient and both factors'."""
    return (3 if is_decoder(shape) else 2) * shape.intermediate_size


def _statistics_floats(shape: ModelShape) -> int:
    """A bound of what norms and attention keep a row or head, and of vectors of the adapter's size in its backward."""
    return 4 * shape.num_heads + 4


def branches(request: Request) -> int:
    """Rows that the head sees for one target: the auxiliary branch reads it once more where later adapters act."""
    config = request.config
    # LoRA acts inside its layer, which is not run; the exact loss has no such branch.
    acts = config.auxiliary_weight and config.adapter != "lora" and config.foresight_every != 1
    return 2 if acts and request.window_layers < request.shape.num_layers else 1


def step_bytes(request: Request, choices: Choices) -> int:
    """One micro-batch forward and backward; the largest of three moments: a layer that keeps nothing, the head, the
    last layer's backward."""
    shape, config = request.shape, request.config
    width, layers = shape.hidden_size, request.window_layers
    tokens, targets = request.part_tokens(choices), request.part_samples(choices) * request.targets
    adapter, inside = adapter_saved_floats(request), config.adapter == "lora"
    saved = saved_floats(shape) + adapter + _statistics_floats(shape)
    # A layer that backward runs again; nothing follows its feed-forward part where the adapter is inside.
    again = saved + _expanded(shape) + (1 + (inside and is_decoder(shape))) * width + _statistics_floats(shape)
    if config.method in FORWARD_ONLY or not layers:
        kept = backward = 0
        at_head = width
    elif choices.recompute:
        # Inputs of all layers; one layer is run again, and its graph stands, when its backward begins.
        kept = at_head = (layers + 1) * width
        backward = again
    else:
        # Below the first bottleneck nothing needs a gradient: that layer keeps nothing.
        kept = layers * saved - (saved_floats(shape) - _first_saved_floats(shape)) if inside else (layers - 1) * saved
        at_head = kept + width + (0 if inside else adapter)
        backward = _expanded(shape) + (2 if is_decoder(shape) else 1) * width if kept else 0
    if config.method == "chain" and config.foresight_every and layers < shape.num_layers:
        # The inputs of the layers above the lowest window, each of which is run again in its turn.
        above = (shape.num_layers - layers) * width
        kept, at_head, backward = kept + above, at_head + above, max(backward, again)
    head = F32 * tokens * at_head
    if request.task == "causal-lm":
        rows = width * (2 + 5 * branches(request)) + _above_floats(request)
        head += F32 * targets * rows + HEAD_WORKSPACE_BYTES
    elif config.pooling == "mean" and branches(request) == 2:
        # Averaged behind the adapters above: what the last one gives, its gradient and what it reads.
        head += F32 * tokens * (3 * width + _above_floats(request))
    forward = live_floats(shape) + adapter  # with the boundary, which the caller holds
    return max(F32 * tokens * max(forward, kept + backward), head)


def fill_bytes(request: Request, choices: Choices) -> int:
    """The prefix over the batches that are held at once; the evaluation's pass ends with a head besides."""
    head = F32 * 4 * request.part_samples(choices) * request.targets * request.shape.hidden_size + HEAD_WORKSPACE_BYTES
    return _held_bytes(request, choices) + max(
        _layer_bytes(request, choices), head if request.task == "causal-lm" else 0
    )


def classifier_bytes(request: Request, choices: Choices) -> int:
    """The classifier in closed form: a client's pass over its samples, or what the server makes of all rows."""
    taking = closed_form.client_bytes(request, _layer_bytes(request, choices))
    return max(taking + _held_bytes(request, choices) if taking else 0, closed_form.fit_bytes(request))


def _held_bytes(request: Request, choices: Choices) -> int:
    """Hidden states of the batches that a layer-major pass holds."""
    width, facts = request.shape.hidden_size, request.facts
    held = max(choices.fill_bytes, F32 * request.part_tokens(choices) * width)
    if facts.largest_client_samples is not None and facts.evaluation_samples is not None:
        samples = max(facts.largest_client_samples, facts.evaluation_samples)
        held = min(held, F32 * samples * request.tokens * width)
    return held


def _layer_bytes(request: Request, choices: Choices) -> int:
    """One layer over a micro-batch, without a graph."""
    return F32 * request.part_tokens(choices) * (live_floats(request.shape) + 2 * request.config.adapter_size)

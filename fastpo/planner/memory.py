r"""Plan a training step before the first one: GPU and host bytes by part, and seconds.

Nothing is loaded: the model's shape comes from its configuration, built on PyTorch's meta device.
With T tokens a row, D hidden, L layers and one prompt copy (T = P + K R),

    weights, adapter, gradients, optimiser     by parameter
    residual stream                            L T D itemsize, on the host with offload_activations
    keys and values of further responses       2 (K - 1) (P + R) kv_width itemsize, one layer's
    working set of one layer                   T (a D + c q_width + d kv_width) + tokens b I
    head                                       the workspace, and [N, D] fp32 a statistic
    logits                                     never

A peak is everything that lasts plus the larger of the last two, which are never alive together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from fastpo.head.schedule import Workload
from fastpo.head.select import plan_head
from fastpo.head.spec import HeadOptions
from fastpo.model.attention.dispatch import COPIES_MIB
from fastpo.model.limits import Positions

GIB = 2**30


class Card(NamedTuple):
    """Hold usable memory in GiB, dense bf16 TFLOP/s, and GB/s to the host in one direction.

    The figures are those of the vendors' data sheets, memory less what the driver keeps.
    """

    memory: float
    tflops: float
    link: float


CARDS = {
    "h100": Card(78, 989, 50),
    "h200": Card(139, 989, 50),
    "b200": Card(178, 2250, 50),
    "a100": Card(78, 312, 25),
    "a100-40": Card(39, 312, 25),
    "l40s": Card(44, 362, 25),
    "rtx4090": Card(23, 165, 25),
    "rtx3090": Card(23, 71, 25),
    "mi300x": Card(190, 1307, 50),
}
# Share of the data sheet's rate that a whole step is assumed to reach; measured on no card yet.
EFFICIENCY = 0.4
# Assumed too: the CUDA context with its libraries, and Python with PyTorch on the host.
CONTEXT, PROCESS = int(0.7 * GIB), 3 * GIB


class _Layer(NamedTuple):
    """Hold bytes a token at three moments of a layer's backward, by widths (hidden, queries, keys).

    `mlp`, and `inner` of its inner width, rules until the MLP runs in tiles; then the backward of
    the norms or of attention does.
    """

    mlp: tuple[int, int, int]
    inner: int
    norm: tuple[int, int, int]
    attention: tuple[int, int, int]


# Counted: live tensors of a checkpointed Llama layer under transformers 5.24 and peft 0.21, three
# responses merged by the log-sum-exp, by doubling one width at a time
# (`bench.long_context.LiveBytes`). By (weights, computed in, method).
_LAYERS = {
    ("float32", "float32", "full"): _Layer((24, 8, 8), 24, (32, 8, 8), (12, 20, 31)),
    ("float32", "float32", "lora"): _Layer((16, 8, 8), 24, (28, 8, 8), (8, 20, 31)),
    ("bfloat16", "bfloat16", "full"): _Layer((18, 4, 4), 12, (34, 4, 4), (10, 12, 19)),
    ("bfloat16", "bfloat16", "lora"): _Layer((28, 6, 4), 14, (36, 6, 4), (12, 13, 19)),
    ("float32", "bfloat16", "full"): _Layer((24, 4, 4), 12, (33, 3, 3), (18, 24, 8)),
    ("float32", "bfloat16", "lora"): _Layer((29, 6, 4), 14, (30, 7, 5), (17, 24, 8)),
}
# Without FlexAttention, which takes over on a GPU in half precision, soft-capped scores are formed
# for a block of queries at a time, in four fp32 copies.
_SCORES, _QUERY_BLOCK = 4, 512
_SIZES = {"float32": 4, "bfloat16": 2}
# Four bits a weight, 8 bits a block of 64, and a float32 for every 256 of those.
_NF4 = 0.5 + (1 + 4 / 256) / 64
# Bytes of optimiser state a trained weight; of others two moments in the weight's own dtype.
_STATES = {
    "sgd": 0.0,
    "adafactor": 0.1,
    "lion_8bit": 1 + 4 / 256,
    "lion_32bit": 4.0,
    "adamw_8bit": 2 * (1 + 4 / 256),
    "adamw_bnb_8bit": 2 * (1 + 4 / 256),
    "adamw_32bit": 8.0,
    "adamw_torch_8bit": 2 * (1 + 4 / 256),
    "adamw_torch_4bit": 2 * (0.5 + 4 / 256),
}


@dataclass(frozen=True)
class Shape:
    """Hold what of a model decides memory and time; widths in elements, weights in numbers."""

    hidden: int
    inner: int
    queries: int
    keys: int
    layers: int
    vocabulary: int
    parameters: int
    linears: tuple[tuple[str, int, int], ...]  # (name, out, in) of the layers' matrices
    head: int  # the head's weight where it is not the embedding, else 0
    windows: tuple[int | None, ...]  # sliding window of each layer
    scored_heads: int  # whose scores are materialised, for a soft-cap; else 0
    positions: Positions | None = None  # how far they reach

    @property
    def matrices(self) -> int:
        """Count weights of the layers' matrices, which are quantised and multiply every token."""
        return sum(out * into for _, out, into in self.linears)

    @classmethod
    def of(cls, config: PretrainedConfig) -> Shape:
        """Return the shape of a dense causal language model.

        Raises:
            ValueError: a mixture of experts, whose memory depends on the routing.
        """
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
        head = model.get_output_embeddings()
        linears, inner = [], 0
        for name, module in model.named_modules():
            if name.endswith(("experts", "router")):
                raise ValueError(f"{config.model_type} is a mixture of experts: not planned here")
            if module is head or not isinstance(module, nn.Linear):
                continue
            linears.append((name, module.out_features, module.in_features))
            if "mlp" in name:
                inner = max(inner, module.in_features)
        if not inner:
            raise ValueError(f"{config.model_type} has no MLP of linear layers: not planned here")
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        window = getattr(config, "sliding_window", None)
        count = config.num_hidden_layers
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * count
        tied = head.weight is model.get_input_embeddings().weight
        return cls(
            hidden=config.hidden_size,
            inner=inner,
            queries=heads * width,
            keys=(getattr(config, "num_key_value_heads", None) or heads) * width,
            layers=count,
            vocabulary=config.vocab_size,
            parameters=sum(p.numel() for p in model.parameters()),
            linears=tuple(linears),
            head=0 if tied else head.weight.numel(),
            windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
            scored_heads=heads if getattr(config, "attn_logit_softcapping", None) else 0,
            positions=Positions.of(model),
        )


@dataclass(frozen=True)
class Job:
    """Describe one training step.

    Args:
        shape: the model's.
        context: longest prompt and response together in tokens, as `max_length`.
        response: of them, the response.
        candidates: responses a prompt, extra ones included.
        groups: prompts a micro-batch.
        method: full, lora, or qlora on NF4 weights.
        weights: dtype of what is not quantised.
        computed: dtype of products; float32 weights with bfloat16 here is autocast.
        rank: of the adapter; `targets`: endings of the names of adapted matrices, None for all.
        embeddings: embedding and head are trained whole beside the adapter, in float32.
        optim: the Trainer's name; a `paged_` one keeps its states on the host.
        reference: none, adapter, copy or store.
        references: whole models that a `copy` means.
        divergence: the objective needs one to the reference's whole distribution.
        share_prompt, offload, mlp_tile, workspace_mib: as in recipes.
    """

    shape: Shape
    context: int
    response: int = 512
    candidates: int = 2
    groups: int = 1
    method: Literal["full", "lora", "qlora"] = "lora"
    weights: str = "bfloat16"
    computed: str = "bfloat16"
    rank: int = 16
    targets: tuple[str, ...] | None = None
    embeddings: bool = False
    optim: str = "adamw_torch"
    reference: str = "none"
    references: int = 1
    divergence: bool = False
    share_prompt: bool = True
    offload: bool = False
    mlp_tile: int | str | None = None
    workspace_mib: int = 256

    def __post_init__(self) -> None:
        if not 0 < self.response < self.context:
            raise ValueError(
                f"a context of {self.context} tokens has no room for a response of "
                f"{self.response} and a prompt: give a smaller response"
            )

    @property
    def warning(self) -> str | None:
        """Return one line where the context reaches beyond the positions the model was made for."""
        positions = self.shape.positions
        if positions is None or not positions.beyond(self.context):
            return None
        return positions.told_of(f"a context of {self.context} tokens", "lower it (max_length)")

    @property
    def prompt(self) -> int:
        """Return P, the tokens of a prompt."""
        return self.context - self.response

    @property
    def tokens(self) -> int:
        """Return T, the tokens of all groups of a micro-batch."""
        copies = 1 if self.share_prompt else self.candidates
        return self.groups * (copies * self.prompt + self.candidates * self.response)


class Plan(NamedTuple):
    """Hold bytes by part, on the device and on the host, and what a step computes and moves."""

    device: dict[str, int]
    host: dict[str, int]
    flop: float
    moved: int  # bytes to the host, and back

    @property
    def peak(self) -> int:
        """Return the most device bytes at once: the head's buffers and a layer's never meet."""
        return sum(self.device.values()) - min(self.device[p] for p in _TRANSIENT)

    @property
    def host_peak(self) -> int:
        """Return the most host bytes at once."""
        return sum(self.host.values())

    def seconds(self, card: Card) -> float:
        """Return a step's seconds: computing at the assumed efficiency, or the link if slower."""
        return max(self.flop / (card.tflops * 1e12 * EFFICIENCY), self.moved / (card.link * 1e9))


_TRANSIENT = ("working set of one layer", "head")


def plan(job: Job) -> Plan:
    """Add up what a step of `job` takes."""
    shape, tokens, size = job.shape, job.tokens, _SIZES[job.weights]
    width, full = _SIZES[job.computed], job.method == "full"
    trained, trained_size = (shape.parameters, size) if full else (_adapter(job), 4)
    quantised = shape.matrices if job.method == "qlora" else 0
    weights = int(quantised * _NF4) + (shape.parameters - quantised) * size
    largest = max(out * into for _, out, into in shape.linears)
    per_state = _STATES.get(job.optim.removeprefix("paged_"), 2.0 * trained_size)
    states, paged = int(trained * per_state), job.optim.startswith("paged_")
    residual = shape.layers * tokens * shape.hidden * size

    layer = _LAYERS[job.weights, job.computed, "full" if full else "lora"]
    tile = shape.hidden if job.mlp_tile == "auto" else job.mlp_tile
    inner_tokens = tokens if tile is None else min(tokens, int(tile))
    widths = (shape.hidden, shape.queries, shape.keys)
    mlp, norm, attention = (
        sum(each * width for each, width in zip(part, widths, strict=True))
        for part in (layer.mlp, layer.norm, layer.attention)
    )
    half = job.computed == "bfloat16"
    scores = 0 if half else _SCORES * shape.scored_heads * _QUERY_BLOCK * job.context * 4
    working = max(
        tokens * mlp + inner_tokens * layer.inner * shape.inner,
        tokens * max(norm, attention) + scores,
    )
    if full:  # gradients of one matrix; in tiles also fp32 sums of a whole MLP's
        sums = 0 if inner_tokens == tokens else 3 * shape.hidden * shape.inner * (4 + 2 * size)
        working += max(largest * size, sums)
    if quantised:
        working += largest * width  # one matrix, dequantised
    further = job.candidates - 1 if job.share_prompt else 0
    copies = 2 * job.groups * further * job.context * shape.keys * width
    if half and copies > COPIES_MIB << 20:
        copies = 0  # attention merges its parts instead

    trains_head = full or job.embeddings
    labels = job.groups * job.candidates * job.response
    work = Workload(
        labels,
        shape.vocabulary,
        shape.hidden,
        want=("logps", "kl_ref_policy") if job.divergence else ("logps",),
        num_grad_stats=1 + job.divergence,
        needs_head=trains_head,
        with_reference=job.divergence,
    )
    _, schedule, _ = plan_head(work, HeadOptions("torch", job.workspace_mib), device="cpu")
    buffers = (1 + job.divergence) if schedule.name == "frozen" else 1
    head = (job.workspace_mib << 20) + labels * shape.hidden * (4 * buffers + size)
    if trains_head:  # dW, before it is accumulated; summed over parts of a batch also in fp32
        head_size = size if full else 4
        sums = 4 if schedule.name == "recompute" and head_size < 4 else 0
        head += shape.vocabulary * shape.hidden * (head_size + sums)

    device = {
        "context and libraries": CONTEXT,
        "weights": weights,
        "adapter": 0 if full else trained * 4,
        "gradients": trained * trained_size,
        "optimiser": 0 if paged else states,
        "reference model": weights * job.references if job.reference == "copy" else 0,
        "weights cast by autocast": shape.parameters * width if full and width < size else 0,
        "residual stream": 3 * residual // shape.layers if job.offload else residual,
        "key and value copies": copies,
        "working set of one layer": working,
        "head": head,
        "logits": 0,
    }
    # The final norm keeps its input in fp32 twice, and what it made of it where its weight learns.
    norms = tokens * shape.hidden * (8 + (width if full else 0))
    host = {
        "process": PROCESS,
        "optimiser": states if paged else 0,
        "layer inputs": residual + norms if job.offload else 0,
    }
    moved = 2 * host["layer inputs"] if job.offload else 0
    return Plan(device, host, _flop(job, labels * schedule.matmuls), moved)


def _adapter(job: Job) -> int:
    """Count the weights of a LoRA adapter, and of what is trained beside it."""
    shape = job.shape
    ends = shape.vocabulary * shape.hidden + shape.head if job.embeddings else 0
    chosen = [
        (out, into)
        for name, out, into in job.shape.linears
        if job.targets is None or name.endswith(job.targets)
    ]
    return ends + sum(job.rank * (out + into) for out, into in chosen)


def _flop(job: Job, head_matmuls: float) -> float:
    """Count a step: forward, recomputation, backward, head, and a live reference's forward."""
    shape = job.shape
    linear = 2 * shape.matrices * job.tokens
    pairs = 0
    for window in shape.windows:
        # Attended pairs of a causal sequence, then of responses against prompt and themselves.
        whole = _pairs(job.context, window)
        further = whole - _pairs(job.prompt, window) if job.share_prompt else whole
        pairs += whole + (job.candidates - 1) * further
    attention = 4 * shape.queries * pairs * job.groups
    live = job.reference in ("adapter", "copy")
    # A flash backward is 2.5 forwards; frozen matrices need no gradient of their own.
    backward = (2 if job.method == "full" else 1) * linear + 2.5 * attention
    head = 2 * head_matmuls * shape.hidden * shape.vocabulary
    return (2 + live) * (linear + attention) + backward + head


def _pairs(length: int, window: int | None) -> int:
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window

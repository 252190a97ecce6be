"""Merge adapters into the weights under them, checked against what was trained; blend models."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from fastpo.model.adapters import lower_saved_modules
from fastpo.model.hidden import causal_lm, mode
from fastpo.model.self_check import largest, one_rounding, rounding_bound

_TOKENS = 32  # length of the row whose logits are compared


class _Logits(NamedTuple):
    """Hold logits of a model on a few tokens, and a bound of what rounding may change."""

    ids: Tensor  # [1, T]
    values: Tensor  # [1, T, V]
    bound: float

    @classmethod
    def of(cls, model: nn.Module) -> _Logits:
        embeddings: Any = causal_lm(model).get_input_embeddings()
        rows = embeddings.weight.shape[0]
        ids = torch.arange(_TOKENS)[None] * rows // _TOKENS
        ids = ids.to(next(embeddings.parameters()).device)
        values = _values(model, ids)
        with one_rounding(model):
            moved = largest(_values(model, ids) - values)
        last = torch.finfo(values.dtype).eps * largest(values)
        # Merged weights are rounded once more, in every adapted matrix of a layer.
        kinds = BaseTunerLayer | ModulesToSaveWrapper
        adapted = sum(isinstance(module, kinds) for module in model.modules())
        return cls(ids, values, math.sqrt(1 + adapted) * rounding_bound(model, moved, last))

    def compare(self, model: nn.Module, what: str) -> None:
        """Refuse a model with other logits with ValueError."""
        off = largest(_values(model, self.ids).to(self.values.device) - self.values)
        if not off <= self.bound:
            raise ValueError(
                f"{what} differs from the model that was trained by {off:.2g} in its logits, "
                f"rounding explains {self.bound:.2g}: keep base model and adapter apart, or merge "
                "in another dtype and without quantization"
            )


@torch.no_grad()
def _values(model: Any, ids: Tensor) -> Tensor:
    with mode(model, training=False):
        return model(input_ids=ids.to(model.device), use_cache=False).logits


def _untie(model: nn.Module) -> None:
    """Give input and output embeddings one matrix each."""
    inner: Any = causal_lm(model)
    ends: list[Any] = [inner.get_input_embeddings(), inner.get_output_embeddings()]
    first, last = (m.get_base_layer() if hasattr(m, "get_base_layer") else m for m in ends)
    if getattr(first, "weight", None) is not getattr(last, "weight", first):
        return
    last.weight = nn.Parameter(last.weight.detach().clone(), last.weight.requires_grad)
    for config in (inner.config, inner.config.get_text_config(decoder=True)):
        config.tie_word_embeddings = False


def merged(model: PeftModel) -> nn.Module:
    """Merge the active adapters into the weights under them, in place.

    A matrix that is both ends of the model becomes two where an adapter stands on one of them.

    Raises:
        ValueError: an adapter that cannot be merged, or a result that is another model.
    """
    trained = _Logits.of(model)
    inner: Any = causal_lm(model)
    ends = inner.get_input_embeddings(), inner.get_output_embeddings()
    if any(isinstance(end, BaseTunerLayer) for end in ends):
        _untie(model)
    if not hasattr(model.base_model, "merge_and_unload"):
        kind = model.peft_config[model.active_adapters[0]].peft_type
        raise ValueError(f"{kind} adapters have no weights to merge: keep base model and adapter")
    lower_saved_modules(model)
    try:
        result: Any = model.merge_and_unload(safe_merge=True)  # pyright: ignore[reportCallIssue]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"peft cannot merge this adapter ({error}): keep base model and adapter"
        ) from error
    trained.compare(result, "the merged model")
    return result


def write_merged(load: Callable[[], PeftModel], folder: Path) -> None:
    """Write a merged model that `from_pretrained` loads without peft, and read it again.

    Args:
        load: makes the model; nobody else may hold it, so that it leaves before it is read again.
        folder: where the weights go.

    Raises:
        ValueError: see `merged`; or what was written is another model.
    """
    model: Any = merged(load())
    written, kind, place = _Logits.of(model), type(model), model.device
    dtype = model.dtype
    model.save_pretrained(folder)
    del model
    again = kind.from_pretrained(folder, dtype=dtype).to(place)
    written.compare(again, f"the model in {folder}")


def check_shares(shares: Mapping[str, float]) -> None:
    """Refuse shares that do not add up to 1 with a ValueError."""
    if not shares or not math.isclose(math.fsum(shares.values()), 1.0, abs_tol=1e-6):
        raise ValueError(f"{dict(shares)} are not shares of one model: they must add up to 1")


def blend(shares: Mapping[str, float], load: Callable[[str], nn.Module]) -> nn.Module:
    r"""Blend several models of one architecture: $\theta = \sum_i c_i \theta_i$.

    {a: 0.5, b: 0.5} is a soup (SALSA's reference, arXiv 2411.01798); {new: 1 + alpha, old: -alpha}
    extrapolates (accelerated preference optimisation, arXiv 2410.06293). Sums run in float32 and
    are rounded once. Two models are in memory at a time; adapters are merged first.

    Args:
        shares: name or folder -> share; shares add up to 1.
        load: opens one of them.

    Raises:
        ValueError: shares that do not add up to 1, or models with other parameters.
    """
    check_shares(shares)
    model: Any = None
    sums: dict[str, Tensor] = {}
    for name, share in shares.items():
        part: Any = load(name)
        if isinstance(part, PeftModel):
            part = merged(part)
        if len(shares) > 1:
            _untie(part)  # merging may have untied another one
        parameters = {n: p.detach().float() * share for n, p in part.named_parameters()}
        if model is None:
            model, sums = part, parameters
            continue
        differing = [n for n in {**sums, **parameters} if not _same_shape(n, sums, parameters)]
        if differing:
            raise ValueError(
                f"{name} and {next(iter(shares))} have not the same parameters: {differing[0]}"
            )
        for n, value in parameters.items():
            sums[n] += value
    with torch.no_grad():
        for n, parameter in model.named_parameters():
            parameter.copy_(sums[n])
    return model


def _same_shape(name: str, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return name in a and name in b and a[name].shape == b[name].shape

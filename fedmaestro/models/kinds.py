"""Kinds of tensors that can belong to a tier instead of to all: biases, the classifier, normalisations."""

from collections.abc import Collection

from torch import nn

from fedmaestro.errors import UserError
from fedmaestro.models.exits import classifiers
from fedmaestro.models.static_norm import StaticNorm
from fedmaestro.models.width import LeadingGroupNorm
from fedmaestro.submodel import state_of

KINDS: dict[str, str] = {
    "bias": "what layers add to their outputs; those of norms are no part of it",
    "head": "all tensors of the last linear layer; of a network with early exits, of each classifier",
    "norm": "weight and bias of every normalisation",
    "step": "step sizes of residual blocks (train.submodel = width-blocks)",
}
"""By the words of ``train.per-tier``."""

_NORMS = (
    StaticNorm,
    LeadingGroupNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._NormBase,
)


def tensors_of(model: nn.Module, kinds: Collection[str], name: str) -> frozenset[str]:
    """Return the names of the tensors of ``model`` that are of these kinds.

    Args:
        model: whose state it is about.
        kinds: words of ``KINDS``.
        name: of the model, for messages.

    Raises:
        UserError: a kind that the model has nothing of.
    """
    found = {kind: _of_kind(model, kind) & state_of(model).keys() for kind in kinds}
    if missing := [kind for kind, names in found.items() if not names]:
        raise UserError(f"train.per-tier: model {name!r} has no {missing[0]}: leave {missing[0]!r} out")
    return frozenset().union(*found.values())


def kinds_in(model: nn.Module, kinds: Collection[str]) -> tuple[str, ...]:
    """Return those of ``kinds`` that a model has tensors of."""
    return tuple(kind for kind in kinds if _of_kind(model, kind))


def _of_kind(model: nn.Module, kind: str) -> set[str]:
    modules = dict(model.named_modules())
    norms = [name for name, module in modules.items() if isinstance(module, _NORMS)]
    if kind == "norm":
        return _inside(model, norms)
    if kind == "step":
        return {name for name, _ in model.named_parameters() if name.split(".")[-1] == "step"}
    if kind == "head":
        return _inside(model, classifiers(model))
    parameters = {name for name, _ in model.named_parameters() if "bias" in name.split(".")[-1]}
    return parameters - _inside(model, norms)


def _inside(model: nn.Module, modules: Collection[str]) -> set[str]:
    names = [name for name, _ in model.named_parameters()]
    return {name for name in names for module in modules if name.startswith(f"{module}." if module else "")}

"""Low-rank ordered (LoD) layers: a weight matrix as ``U · V`` whose rank prefixes are usable models.

Shapes: ``O`` out features or channels, ``I`` in features or channels, ``R`` full rank, ``r`` current rank prefix,
``k×l`` kernel, ``B`` batch, ``H×W`` space.

Source: Horváth et al., "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition", ICML 2024, section 3.
Departures: a prefix is a slice (the cost is that of the prefix; the release masks), ranks are integers (the release
recovers them from fractions, off by one for some), and rank 0 means "bias only".
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmaestro.errors import UserError, check_name

_Module = TypeVar("_Module", bound=nn.Module)


class LoDLayer(nn.Module, ABC):
    """A layer ``x ↦ U[:, :r] · V[:r] x + bias`` with a settable integer prefix ``r``.

    Attributes:
        u: ``(O, R)``.
        v: ``(R, I)``, or ``(R, I, k…)`` of a convolution.
        bias: ``(O,)`` or None; it belongs to the U side and to every prefix.

    ``state_dict`` carries the prefix, so loading it brings the rank back.
    """

    u: nn.Parameter
    v: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, u: Tensor, v: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        if u.shape[1] != v.shape[0]:
            raise UserError(f"factors disagree on the rank: u is {tuple(u.shape)}, v is {tuple(v.shape)}")
        self.u = nn.Parameter(u)
        self.v = nn.Parameter(v)
        self.bias = None if bias is None else nn.Parameter(bias)
        self._rank = self.max_rank

    @property
    def max_rank(self) -> int:
        """``R``, the number of columns of ``u`` that this layer holds."""
        return self.v.shape[0]

    @property
    def rank(self) -> int:
        """The prefix ``r`` in use, ``0 ≤ r ≤ R``."""
        return self._rank

    @rank.setter
    def rank(self, value: int) -> None:
        self._rank = check_rank(value, self.max_rank)

    def prefix(self) -> tuple[Tensor, Tensor]:
        """Return ``(U[:, :r], V[:r])``; the parameters themselves at full rank, which spares autograd a copy."""
        if self._rank == self.max_rank:
            return self.u, self.v
        return self.u[:, : self._rank], self.v[: self._rank]

    def extra_repr(self) -> str:
        return f"u={tuple(self.u.shape)}, v={tuple(self.v.shape)}, rank={self._rank}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Add ``rank`` (int64 scalar) below the full rank; without it, all columns are in use."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._rank < self.max_rank:
            destination[f"{prefix}rank"] = torch.tensor(self._rank)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The caller's dictionary is a copy; what is left in it counts as unexpected.
        rank: Any = state_dict.pop(f"{prefix}rank", None)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.rank = self.max_rank if rank is None else _plain(rank)

    @abstractmethod
    def replaced(self, u: Tensor, v: Tensor) -> "LoDLayer":
        """Return a layer with these factors, a copy of the bias and this layer's settings, also ``requires_grad``."""

    @abstractmethod
    def dense(self) -> nn.Module:
        """Return the plain PyTorch layer that computes the current prefix; its weight is frozen if both factors are."""


class LoDLinear(LoDLayer):
    """Linear layer in LoD form: ``u (O, R)``, ``v (R, I)``."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(…, I)`` to ``(…, O)`` with ``r · (I + O)`` multiply-accumulates per row."""
        if self._rank == 0:
            return _only_bias(x.new_zeros(*x.shape[:-1], self.u.shape[0]), self.bias)
        u, v = self.prefix()
        return F.linear(F.linear(x, v), u, self.bias)

    def replaced(self, u: Tensor, v: Tensor) -> "LoDLinear":
        return freeze_like(LoDLinear(u, v, _copy(self.bias)), u=self.u, v=self.v, bias=self.bias)

    def dense(self) -> nn.Linear:
        u, v = self.prefix()
        out_features, in_features = u.shape[0], v.shape[1]
        layer = _uninitialised(
            nn.Linear, in_features, out_features, bias=self.bias is not None, device=u.device, dtype=u.dtype
        )
        return cast(nn.Linear, _filled(layer, u @ v, self))


class LoDConv(LoDLayer):
    """Convolution in LoD form: ``v (R, I, k…)`` carries the geometry, ``u (O, R)`` is one of kernel 1.

    ``dims`` is 1, 2 or 3; stride, padding and dilation have as many numbers. Padding may be ``valid`` or ``same``.
    """

    dims: ClassVar[int]
    _convolve: ClassVar[Callable[..., Tensor]]
    _plain: ClassVar[type[nn.Module]]

    def __init__(
        self,
        u: Tensor,
        v: Tensor,
        bias: Tensor | None,
        *,
        stride: tuple[int, ...] = (),
        padding: tuple[int, ...] | str = (),
        dilation: tuple[int, ...] = (),
    ) -> None:
        super().__init__(u, v, bias)
        self.stride = stride or (1,) * self.dims
        self.padding = padding or (0,) * self.dims
        self.dilation = dilation or (1,) * self.dims

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, I, …)`` to ``(B, O, …)`` with ``r · (I·k… + O)`` MACs per output position."""
        if self._rank == 0:
            return _only_bias(x.new_zeros(x.shape[0], self.u.shape[0], *self._out_space(x)), self.bias, dim=1)
        u, v = self.prefix()
        convolve = type(self)._convolve
        hidden = convolve(x, v, None, self.stride, self.padding, self.dilation)
        return convolve(hidden, u[(..., *(None,) * self.dims)], self.bias)

    def _out_space(self, x: Tensor) -> list[int]:
        if self.padding == "same":
            return list(x.shape[2:])
        kernel = self.v.shape[2:]
        padding = [0 if isinstance(self.padding, str) else self.padding[i] for i in range(self.dims)]
        return [
            (x.shape[2 + i] + 2 * padding[i] - self.dilation[i] * (kernel[i] - 1) - 1) // self.stride[i] + 1
            for i in range(self.dims)
        ]

    def replaced(self, u: Tensor, v: Tensor) -> "LoDConv":
        new = type(self)(u, v, _copy(self.bias), stride=self.stride, padding=self.padding, dilation=self.dilation)
        return freeze_like(new, u=self.u, v=self.v, bias=self.bias)

    def dense(self) -> nn.Module:
        u, v = self.prefix()
        layer = _uninitialised(
            self._plain,
            v.shape[1],
            u.shape[0],
            tuple(v.shape[2:]),
            self.stride,
            self.padding,
            self.dilation,
            bias=self.bias is not None,
            device=u.device,
            dtype=u.dtype,
        )
        return _filled(layer, torch.einsum("or,ri...->oi...", u, v), self)


class LoDConv1d(LoDConv):
    """``LoDConv`` over ``(B, I, L)``."""

    dims = 1
    _convolve = staticmethod(F.conv1d)
    _plain = nn.Conv1d


class LoDConv2d(LoDConv):
    """``LoDConv`` over ``(B, I, H, W)``."""

    dims = 2
    _convolve = staticmethod(F.conv2d)
    _plain = nn.Conv2d


class LoDConv3d(LoDConv):
    """``LoDConv`` over ``(B, I, D, H, W)``."""

    dims = 3
    _convolve = staticmethod(F.conv3d)
    _plain = nn.Conv3d


def layers(model: nn.Module) -> dict[str, LoDLayer]:
    """Return the LoD layers of ``model`` by qualified name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoDLayer)}


def max_ranks(model: nn.Module) -> dict[str, int]:
    """Return ``R`` of every LoD layer."""
    return {name: layer.max_rank for name, layer in layers(model).items()}


def set_ranks(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Run ``model`` at rank prefixes; tensors stay untouched, layers that are not named keep their prefix.

    Raises:
        UserError: a name that is no LoD layer, a rank that is not an integer or outside ``0 … R``. Nothing is set then.
    """
    known = layers(model)
    for name, rank in checked_ranks(known, ranks).items():
        known[name].rank = rank


def checked_ranks(known: Mapping[str, LoDLayer], ranks: Mapping[str, int]) -> dict[str, int]:
    """Return ``ranks`` as plain integers after checking names, types and bounds."""
    checked = {}
    for name, rank in ranks.items():
        check_name("LoD layer", name, known)
        checked[name] = check_rank(rank, known[name].max_rank, name)
    return checked


def check_rank(value: int, max_rank: int, name: str = "") -> int:
    """Return ``value`` as an int in ``0 … max_rank``; UserError otherwise (fractions are refused, not rounded)."""
    where = f" of layer {name!r}" if name else ""
    if isinstance(value, bool):
        raise UserError(f"rank{where} must be an integer, got {value!r}")
    try:
        rank = operator.index(value)
    except TypeError:
        raise UserError(f"rank{where} must be an integer, got {value!r}") from None
    if not 0 <= rank <= max_rank:
        raise UserError(f"rank{where} must be between 0 and {max_rank}, got {rank}")
    return rank


def freeze_like(layer: _Module, **sources: Tensor | None) -> _Module:
    """Give each named parameter of ``layer`` the ``requires_grad`` of its source (None: no such parameter)."""
    for name, source in sources.items():
        if source is not None:
            layer.get_parameter(name).requires_grad_(source.requires_grad)
    return layer


def _uninitialised(kind: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    return nn.utils.skip_init(kind, *args, **kwargs)  # type: ignore[no-untyped-call, no-any-return]


def _only_bias(zeros: Tensor, bias: Tensor | None, dim: int = -1) -> Tensor:
    if bias is None:
        return zeros
    shape = [1] * zeros.dim()
    shape[dim] = -1
    return zeros + bias.view(shape)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def _copy(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().clone()


@torch.no_grad()
def _filled(layer: nn.Module, weight: Tensor, source: LoDLayer) -> nn.Module:
    cast(Tensor, layer.weight).copy_(weight)
    if source.bias is not None:
        cast(Tensor, layer.bias).copy_(source.bias)
    factor = source.u if source.u.requires_grad else source.v
    return freeze_like(layer, weight=factor, bias=source.bias)

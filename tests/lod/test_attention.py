"""Attention in LoD form against PyTorch's. ``N`` batch, ``L`` queries, ``S`` keys, ``E`` embedding, ``h`` heads."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmaestro import lod
from fedmaestro.errors import UserError
from fedmaestro.lod.attention import LoDMultiheadAttention

N, L, S, E, H = 3, 4, 5, 12, 4
PROJECTIONS = ["q", "k", "v", "out"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def randomised(model: nn.Module) -> nn.Module:
    """Double precision and no zero biases: what is not computed shows."""
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / max(1, parameter.shape[-1]) ** 0.5)
    return model


def attention(**options: Any) -> nn.MultiheadAttention:
    return randomised(nn.MultiheadAttention(E, H, **options))  # type: ignore[return-value]


def factorised(dense: nn.MultiheadAttention) -> LoDMultiheadAttention:
    layer = lod.factorize(dense)
    assert isinstance(layer, LoDMultiheadAttention)
    return layer


def inputs(*, batch_first: bool, kdim: int = E, vdim: int = E, batched: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((L, E), (S, kdim), (S, vdim))
    if not batched:
        return tuple(torch.randn(shape).double() for shape in shapes)  # type: ignore[return-value]
    x = [torch.randn(N, *shape).double() for shape in shapes]
    return tuple(x if batch_first else [t.transpose(0, 1) for t in x])  # type: ignore[return-value]


def assert_same(actual: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None]) -> None:
    assert len(actual) == len(expected) == 2
    for a, e in zip(actual, expected, strict=True):
        if e is None:
            assert a is None
        else:
            assert a is not None
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)


def key_padding(kind: str) -> Tensor | None:
    mask = torch.zeros(N, S, dtype=torch.bool)
    mask[1, 3:] = mask[2, 1:] = True
    return {"none": None, "bool": mask, "float": torch.where(mask, -3.0, 0.25).double()}[kind]


def attn_mask(kind: str) -> Tensor | None:
    per_head = torch.randn(N * H, L, S, generator=torch.Generator().manual_seed(6)).double()
    forbidden = per_head > 0.5
    forbidden[..., 0] = False  # a query without any key has no weights
    return {
        "none": None,
        "bool": forbidden[0],
        "float": per_head[0],
        "bool per head": forbidden,
        "float per head": per_head,
    }[kind]


# ---------------------------------------------------------------- the layer


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 7, "vdim": 9}, {"kdim": 7, "bias": False}])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_the_factorised_layer_computes_the_same(options: dict[str, Any], batch_first: bool, need_weights: bool) -> None:
    dense = attention(batch_first=batch_first, **options)
    layer = factorised(dense)
    dims = {key: options[key] for key in ("kdim", "vdim") if key in options}
    for batched in (True, False):
        x = inputs(batch_first=batch_first, batched=batched, **dims)
        for average in (True, False):
            call = {"need_weights": need_weights, "average_attn_weights": average}
            assert_same(layer(*x, **call), dense(*x, **call))
    assert list(lod.layers(layer)) == PROJECTIONS
    assert (layer.embed_dim, layer.kdim, layer.vdim) == (dense.embed_dim, dense.kdim, dense.vdim)


@pytest.mark.parametrize("padding", ["none", "bool", "float"])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "bool per head", "float per head"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
def test_masks_mean_the_same(padding: str, mask: str, need_weights: bool) -> None:
    dense = attention(batch_first=True)
    x = inputs(batch_first=True)
    call = {"key_padding_mask": key_padding(padding), "attn_mask": attn_mask(mask), "need_weights": need_weights}
    for model in (dense, dense.eval()):
        assert_same(factorised(model)(*x, **call), model(*x, **call))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padding", ["none", "bool"])
@pytest.mark.parametrize("training", [True, False])
def test_self_attention_under_a_causal_mask(need_weights: bool, padding: str, training: bool) -> None:
    dense = attention(batch_first=True).train(training)
    layer = factorised(dense)
    x = torch.randn(N, S, E).double()
    causal = torch.ones(S, S, dtype=torch.bool).triu(1)
    call = {"key_padding_mask": key_padding(padding), "attn_mask": causal, "need_weights": need_weights}
    with torch.no_grad():  # in evaluation, PyTorch's layer takes its fused path then
        assert_same(layer(x, x, x, is_causal=True, **call), dense(x, x, x, is_causal=True, **call))
        early = layer(x[:, :2], x[:, :2], x[:, :2], attn_mask=causal[:2, :2], is_causal=True, need_weights=False)[0]
        if padding == "none":
            torch.testing.assert_close(layer(x, x, x, is_causal=True, **call)[0][:, :2], early)


def test_a_causal_promise_needs_the_mask() -> None:
    x = torch.randn(N, S, E).double()
    with pytest.raises(ValueError, match="is_causal only describes attn_mask"):
        factorised(attention(batch_first=True))(x, x, x, is_causal=True)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"attn_mask": torch.zeros(S, L)}, r"attn_mask must be \(4, 5\) or \(12, 4, 5\), got \(5, 4\)"),
        ({"attn_mask": torch.zeros(1, S)}, "attn_mask must be"),
        ({"attn_mask": torch.zeros(N, L, S)}, "attn_mask must be"),
        ({"key_padding_mask": torch.zeros(S, N)}, r"key_padding_mask must be \(3, 5\), got \(5, 3\)"),
        ({"key_padding_mask": torch.zeros(1, S)}, "key_padding_mask must be"),
    ],
)
def test_masks_of_other_shapes_are_refused(masks: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factorised(attention())(*inputs(batch_first=False), **masks)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_acts_in_training_only(need_weights: bool) -> None:
    dense = attention(dropout=0.5)
    layer = factorised(dense)
    x = inputs(batch_first=False)
    first, second = (layer(*x, need_weights=need_weights)[0] for _ in range(2))
    assert not torch.equal(first, second)
    layer, dense = layer.eval(), dense.eval()
    assert_same(layer(*x, need_weights=need_weights), dense(*x, need_weights=need_weights))
    kept = factorised(attention(dropout=0.25)).train()(*x, average_attn_weights=False)[1]
    assert kept is not None
    assert (kept == 0).any()


@settings(max_examples=20)
@given(ranks=st.fixed_dictionaries({name: st.integers(0, E) for name in PROJECTIONS}))
def test_prefixes_cut_and_recomposed_layers_agree(ranks: dict[str, int]) -> None:
    layer = factorised(attention(batch_first=True))
    x = inputs(batch_first=True)
    reference = attention(batch_first=True)
    with torch.no_grad():
        factors = [(getattr(layer, name), ranks[name]) for name in PROJECTIONS]
        products = [factor.u[:, :r] @ factor.v[:r] for factor, r in factors]
        reference.in_proj_weight.copy_(torch.cat(products[:3]))
        reference.in_proj_bias.copy_(torch.cat([getattr(layer, name).bias for name in PROJECTIONS[:3]]))
        reference.out_proj.weight.copy_(products[3])
        reference.out_proj.bias.copy_(layer.out.bias)
    lod.set_ranks(layer, ranks)
    small, recomposed = lod.truncate(layer, ranks), lod.recompose(layer)
    for model in (layer, small, recomposed):
        assert_same(model(*x), reference(*x))
    assert lod.max_ranks(small) == ranks
    for name, r in ranks.items():  # break-even at E·E / 2E
        assert isinstance(recomposed.get_submodule(name), nn.Linear) == (r >= E // 2)


# ---------------------------------------------------------------- factorize


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_added_keys_are_refused_unless_skipped(options: dict[str, bool]) -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(E, H, **options), "head": nn.Linear(E, 3)})
    (option,) = options
    with pytest.raises(UserError, match=rf"'attention' cannot be factorised \({option}=True\): add its name to skip"):
        lod.factorize(model)
    assert list(lod.layers(lod.factorize(model, skip=["attention"]))) == ["head"]


@pytest.mark.parametrize("skip", ["attention", "attention.out_proj"])
def test_a_skipped_attention_stays_dense_altogether(skip: str) -> None:
    model = nn.ModuleDict({"attention": attention(), "head": nn.Linear(E, 3)})
    kept = lod.factorize(model, skip=[skip])
    assert list(lod.layers(kept)) == ["head"]
    x = inputs(batch_first=False)
    assert torch.equal(kept.get_submodule("attention")(*x)[0], model["attention"](*x)[0])
    assert isinstance(lod.factorize(attention(), skip=[""]), nn.MultiheadAttention)
    assert isinstance(lod.factorize(attention(), skip=["out_proj"]), nn.MultiheadAttention)


@pytest.mark.parametrize("part", ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"])
@pytest.mark.parametrize("grad", [True, False])
def test_frozen_parts_stay_frozen(part: str, grad: bool) -> None:
    dense = attention()
    dense.get_parameter(part).requires_grad_(False)
    with torch.set_grad_enabled(grad):
        layer = factorised(dense)
    names = PROJECTIONS[:3] if part.startswith("in_") else PROJECTIONS[3:]
    frozen = {f"{n}.{factor}" for n in names for factor in (("bias",) if part.endswith("bias") else ("u", "v"))}
    assert {name for name, parameter in layer.named_parameters() if not parameter.requires_grad} == frozen


def test_tied_attention_is_refused_unless_skipped() -> None:
    model = nn.ModuleDict({"attention": attention(), "head": nn.Linear(E, E).double()})
    model["head"].weight = model["attention"].out_proj.weight
    with pytest.raises(UserError, match=r"'attention' and 'head' share .*add 'attention' and 'head' to skip"):
        lod.factorize(model)
    kept = lod.factorize(model, skip=["attention", "head"])
    assert kept.get_submodule("head").weight is kept.get_submodule("attention.out_proj").weight


# ---------------------------------------------------------------- PyTorch's Transformer around it


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(E, H, 17, **{"dropout": 0.0, "batch_first": True, **options})


def encoder(**options: Any) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(encoder_layer(), 3, **options)


def padded(*lengths: int) -> Tensor:
    return torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]


SOURCE = torch.randn(N, S, E, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
TARGET = torch.randn(N, L, E, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
PADDED = padded(5, 3, 1)

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "post-norm": encoder_layer,
    "pre-norm": lambda: encoder_layer(norm_first=True),
    "gelu": lambda: encoder_layer(activation="gelu"),
    "sequence first": lambda: encoder_layer(batch_first=False),
    "no bias": lambda: encoder_layer(bias=False),
}
SKIPS: list[list[str]] = [[], ["self_attn"], ["linear1", "linear2"]]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("skip", SKIPS, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padding", [None, PADDED])
def test_an_encoder_layer_computes_the_same(name: str, skip: list[str], training: bool, padding: Tensor | None) -> None:
    dense = randomised(LAYERS[name]()).train(training)
    model = lod.factorize(dense, skip=skip)
    source = SOURCE.transpose(0, 1) if name == "sequence first" else SOURCE
    for no_grad in (True, False):
        with torch.set_grad_enabled(not no_grad):
            expected, actual = (m(source, src_key_padding_mask=padding) for m in (dense, model))
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


ENCODER_SKIPS = {
    "all": [],
    "first layer dense": ["layers.0.self_attn", "layers.0.linear1", "layers.0.linear2"],
    "every attention": [f"layers.{i}.self_attn" for i in range(3)],
}


@pytest.mark.parametrize("skip", ENCODER_SKIPS.values(), ids=ENCODER_SKIPS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padding", [None, PADDED])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_an_encoder_computes_the_same(skip: list[str], training: bool, padding: Tensor | None) -> None:
    dense = randomised(encoder(norm=nn.LayerNorm(E))).train(training)
    model = lod.factorize(dense, skip=skip)
    with torch.no_grad():
        expected, actual = (m(SOURCE, src_key_padding_mask=padding) for m in (dense, model))
    # PyTorch's nested tensors leave zeros (here: normed ones) where there is padding; nobody may read those.
    real = ~PADDED if padding is not None else torch.ones(N, S, dtype=torch.bool)
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_cut_recomposed_and_copied_encoders_stay_off_the_fast_path() -> None:
    model = lod.factorize(randomised(encoder()).eval(), skip=["layers.0.self_attn"])
    lod.set_ranks(model, dict.fromkeys(lod.layers(model), E // 3))
    ranks = {name: layer.rank for name, layer in lod.layers(model).items()}
    with torch.no_grad():
        expected = model(SOURCE, src_key_padding_mask=PADDED)
        for other in (lod.truncate(model, ranks), lod.recompose(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(SOURCE, src_key_padding_mask=PADDED), expected, rtol=1e-9, atol=1e-10)
        full = lod.factorize(randomised(encoder()).eval())
        assert not lod.layers(lod.recompose(full))
        expected = full(SOURCE, src_key_padding_mask=PADDED)
        recomposed = lod.recompose(full)(SOURCE, src_key_padding_mask=PADDED)
        torch.testing.assert_close(recomposed, expected, rtol=1e-9, atol=1e-10)


def test_what_holds_no_lod_layer_keeps_its_fast_path() -> None:
    model = nn.ModuleDict({"text": encoder(), "head": nn.Linear(E, 2)})
    names = [f"text.layers.{i}.{part}" for i in range(3) for part in ("self_attn", "linear1", "linear2")]
    kept = lod.factorize(model, skip=names).get_submodule("text")
    assert kept.use_nested_tensor
    assert kept.get_submodule("layers.0").activation_relu_or_gelu == 1
    lod.factorize(model)
    assert model["text"].use_nested_tensor
    assert model["text"].layers[0].activation_relu_or_gelu == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"batch_first": False}, {"bias": False}], ids=str)
def test_a_decoder_layer_computes_the_same(options: dict[str, bool], training: bool) -> None:
    dense = nn.TransformerDecoderLayer(E, H, 17, **{"dropout": 0.0, "batch_first": True, **options})
    dense = randomised(dense).train(training)  # type: ignore[assignment]
    model = lod.factorize(dense)
    assert {name.partition(".")[0] for name in lod.layers(model)} == {
        "self_attn",
        "multihead_attn",
        "linear1",
        "linear2",
    }
    target, memory = (t if dense.self_attn.batch_first else t.transpose(0, 1) for t in (TARGET, SOURCE))
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    masks = {"tgt_mask": causal, "memory_key_padding_mask": torch.where(PADDED, -torch.inf, 0.0).double()}
    for call in ({}, masks, {**masks, "tgt_is_causal": True}):
        with torch.no_grad():
            torch.testing.assert_close(
                model(target, memory, **call), dense(target, memory, **call), rtol=1e-9, atol=1e-10
            )

"""The translation Transformer. ``B`` batch, ``S`` source and ``T`` target tokens, ``E`` embedding, ``V`` vocabulary."""

import copy
import math
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from fedmaestro import lod
from fedmaestro.errors import UserError
from fedmaestro.fleet.cost import cost, trace
from fedmaestro.models import MODELS
from fedmaestro.models.architecture import Architecture
from fedmaestro.models.init import initialize
from fedmaestro.models.transformer import Transformer, TransformerSize, positions
from fedmaestro.models.width import Scale
from fedmaestro.submodel import num_elements

V = 23
TINY = TransformerSize(embedding=12, feed_forward=20, heads=3, depth=2)
PAPER = Architecture(name="transformer", input_shape=(28,), num_classes=9521, form="dense")


def initialised(size: TransformerSize = TINY, vocabulary: int = V, seed: int = 0) -> Transformer:
    """From memory full of NaN."""
    with torch.device("meta"):
        model = Transformer(vocabulary, size)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
    initialize(model, torch.Generator().manual_seed(seed))
    return model


@cache
def tiny() -> Transformer:
    return initialised().double().eval()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(4, V, shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- size and cost


def test_the_parameters_are_those_of_the_paper() -> None:
    E, W, vocabulary = 512, 2048, 9521
    attention, feed_forward, norm = 4 * E * E, 2 * E * W + W + E, 2 * E
    encoder, decoder = attention + feed_forward + 2 * norm, 2 * attention + feed_forward + 3 * norm
    expected = 6 * (encoder + decoder) + 2 * norm + 2 * vocabulary * E
    params = num_elements(PAPER.shapes(PAPER.full_size))
    # Pufferfish's 48,978,432 have one matrix for both embeddings and the output.
    assert params == expected == 48_978_432 + vocabulary * E == 53_853_184
    assert abs(params - 53.9e6) < 0.1e6


def test_it_takes_1_37_gmacs_at_28_tokens() -> None:
    """The paper gives 1.37 GMACs and no length: 28 tokens on either side are our inference from it."""
    E, W, L = 512, 2048, 28
    per_token = 6 * (4 * E * E + 2 * E * W) + 6 * (8 * E * E + 2 * E * W) + 9521 * E
    macs = cost(trace(PAPER.full, PAPER.input_shape), {}, batch_size=1).macs_per_example
    assert macs == L * per_token == 1_369_618_432


def test_the_small_model_is_a_twentieth() -> None:
    small = Architecture(name="transformer-small", input_shape=(28,), num_classes=9521, form="dense")
    assert num_elements(small.shapes(small.full_size)) == 2_608_320
    macs = cost(trace(small.full, small.input_shape), {}, batch_size=1).macs_per_example
    assert macs == 28 * (6 * 4 * 96 * 96 + 3 * 4 * 96 * 96 + 6 * 2 * 96 * 384 + 9521 * 96)


# ---------------------------------------------------------------- function


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_it_is_pytorchs_transformer_between_embedding_and_output() -> None:
    model, size = tiny(), TINY
    reference = nn.Transformer(
        size.embedding,
        size.heads,
        size.depth,
        size.depth,
        size.feed_forward,
        batch_first=True,
        norm_first=True,
        bias=True,
    )
    reference = reference.double().eval()
    for side in ("encoder", "decoder"):
        for own, other in zip(getattr(model, side), getattr(reference, side).layers, strict=True):
            pairs = [(own.attention, other.self_attn)]
            if side == "decoder":
                pairs.append((own.source_attention, other.multihead_attn))
            with torch.no_grad():
                for mine, theirs in pairs:
                    theirs.in_proj_weight.copy_(torch.cat([mine.q.weight, mine.k.weight, mine.v.weight]))
                    theirs.out_proj.weight.copy_(mine.out.weight)
            other.linear1.load_state_dict(own.feed_forward.fc1.state_dict())
            other.linear2.load_state_dict(own.feed_forward.fc2.state_dict())
    source, target = tokens(3, 6), tokens(3, 5, seed=1)
    source[0, 4:] = source[2, 1:] = 0
    embedded = [model.embedding(t) * math.sqrt(12) for t in (source, target)]
    embedded = [x + positions(x) for x in embedded]
    padding = torch.where(source == 0, -math.inf, 0.0).double()
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    decoded = reference(*embedded, tgt_mask=causal, src_key_padding_mask=padding, memory_key_padding_mask=padding)
    torch.testing.assert_close(model(source, target), decoded @ model.output.weight.T)


def test_a_target_token_sees_only_itself_and_what_is_before_it() -> None:
    source, target = tokens(1, 5), tokens(1, 6)
    logits = tiny()(source, target)
    for t in range(6):
        torch.testing.assert_close(tiny()(source, target[:, : t + 1])[:, t], logits[:, t])
        if t > 0:
            changed = target.clone()
            changed[0, t] = (changed[0, t] + 1) % V
            after = tiny()(source, changed)
            torch.testing.assert_close(after[:, :t], logits[:, :t])
            assert not torch.allclose(after[:, t], logits[:, t])


# ---------------------------------------------------------------- as an architecture


@pytest.mark.parametrize("name", ["transformer", "transformer-small"])
def test_images_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"'{name}' needs token sequences \(L,\), got the input shape \(1, 8, 8\)"):
        MODELS[name].build((1, 8, 8), V, Scale())


def test_every_projection_is_factorised_but_the_output() -> None:
    arch = Architecture(name="transformer-small", input_shape=(8,), num_classes=300)
    ranks = lod.max_ranks(arch.full)
    attentions = [f"encoder.{i}.attention" for i in range(3)]
    attentions += [f"decoder.{i}.{kind}" for i in range(3) for kind in ("attention", "source_attention")]
    feed_forward = [f"{side}.{i}.feed_forward" for side in ("encoder", "decoder") for i in range(3)]
    expected = {f"{a}.{p}" for a in attentions for p in ("q", "k", "v", "out")}
    expected |= {f"{f}.{p}" for f in feed_forward for p in ("fc1", "fc2")}
    assert ranks == dict.fromkeys(expected, 96)
    everything = Architecture(name="transformer-small", input_shape=(8,), num_classes=300, keep_dense="none")
    assert lod.max_ranks(everything.full).keys() == expected | {"output"}


def test_the_lod_form_computes_the_same_and_is_cut_and_recomposed() -> None:
    model = lod.factorize(tiny())
    source, target = tokens(2, 5), tokens(2, 4)
    torch.testing.assert_close(model(source, target), tiny()(source, target))
    torch.testing.assert_close(lod.recompose(model)(source, target), tiny()(source, target))
    ranks = {name: i % (R + 1) for i, (name, R) in enumerate(lod.max_ranks(model).items())}
    lod.set_ranks(model, ranks)
    expected = model(source, target)
    assert not torch.allclose(expected, tiny()(source, target))
    for other in (lod.truncate(model, ranks), lod.recompose(model)):
        torch.testing.assert_close(other(source, target), expected)


@pytest.mark.parametrize("form", ["dense", "lod"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_it_can_be_exported_for_any_batch_and_lengths(form: str) -> None:
    model = copy.deepcopy(tiny()) if form == "dense" else lod.factorize(tiny())
    B, S, T = (torch.export.Dim(name, min=2, max=64) for name in "BST")
    shapes = {"source": {0: B, 1: S}, "target": {0: B, 1: T}}
    program = torch.export.export(model, (tokens(3, 5), tokens(3, 4)), dynamic_shapes=shapes)
    source, target = tokens(2, 9), tokens(2, 7)
    source[0, 5:] = 0
    torch.testing.assert_close(program.module()(source, target), model(source, target))


# ---------------------------------------------------------------- initialisation and training


def test_every_tensor_is_initialised_from_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, second, other = (initialised(seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        if tensor.dim() > 1:
            assert not torch.equal(tensor, other[name])
        elif "norm" in name and name.endswith("weight"):
            assert (tensor == 1).all()
        else:
            assert (tensor == 0).all()

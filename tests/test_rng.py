"""Streams: a function of their arguments only, all different, and nothing global."""

import ast
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmaestro import rng

ROOT = Path(__file__).parents[1]
WORD = st.integers(0, 2**32 - 1)
KEYS = st.tuples(WORD, st.text(max_size=10), WORD, WORD)


def first_draws(seed: int, purpose: str, *indices: int) -> list[int]:
    return [int(x) for x in rng.generator(seed, purpose, *indices).integers(2**63, size=2)]


@given(KEYS)
def test_same_arguments_give_the_same_stream(key: tuple[int, str, int, int]) -> None:
    assert first_draws(*key) == first_draws(*key)
    assert rng.derived_seed(*key) == rng.derived_seed(*key)


@given(KEYS, KEYS)
def test_another_seed_purpose_or_index_gives_another_stream(
    a: tuple[int, str, int, int], b: tuple[int, str, int, int]
) -> None:
    assert (first_draws(*a) == first_draws(*b)) == (a == b)


@pytest.mark.parametrize("other", [(1, "a", 2, 3), (0, "b", 2, 3), (0, "a", 3, 3), (0, "a", 2, 4), (0, "a", 3, 2)])
def test_each_argument_matters(other: tuple[int, str, int, int]) -> None:
    assert first_draws(0, "a", 2, 3) != first_draws(*other)


def test_a_further_index_gives_another_stream() -> None:
    assert first_draws(0, "a") != first_draws(0, "a", 0)
    assert first_draws(0, "a", 1) != first_draws(0, "a", 1, 0)


def test_purposes_in_the_source_do_not_collide() -> None:
    """Purposes are hashed to 32 bits, and one purpose must keep its number of indices (see the test above)."""
    arities: dict[str, set[int]] = {}
    for folder in ("fedmaestro", "strategies", "clients"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if not (isinstance(node, ast.Call) and len(node.args) > 1):
                    continue
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                purpose = node.args[1]
                if name in ("generator", "derived_seed") and isinstance(purpose, ast.Constant):
                    arities.setdefault(purpose.value, set()).add(len(node.args) - 2)
    assert {"availability", "sample", "tiers"} <= arities.keys(), "the search finds nothing any more"
    assert len({zlib.crc32(purpose.encode()) for purpose in arities}) == len(arities)
    assert {purpose: len(found) for purpose, found in arities.items()} == dict.fromkeys(arities, 1)


def test_no_global_generator_is_read_or_moved() -> None:
    expected = first_draws(3, "sample", 5)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert first_draws(3, "sample", 5) == expected
    rng.derived_seed(3, "init")
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert before == after


@given(KEYS)
def test_derived_seeds_have_32_bits(key: tuple[int, str, int, int]) -> None:
    assert 0 <= rng.derived_seed(*key) < 2**32


def test_derivation_is_recorded() -> None:
    """Recorded with numpy 2: a change here changes every result that was ever published with a seed."""
    assert [int(x) for x in rng.generator(0, "sample", 1).integers(2**63, size=3)] == [
        7608439017614492086,
        7017460809593476018,
        1369338582723754135,
    ]
    assert rng.generator(7, "availability", 3).random(2).tolist() == [0.538866500445386, 0.8707507880492364]
    assert rng.derived_seed(2**32 - 1, "local", 3, 17) == 3539739230
    assert rng.generator(1, "tiers").permutation(6).tolist() == [3, 0, 1, 5, 4, 2]

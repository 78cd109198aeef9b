"""Setups A, B and C on a few seeds; ``test_run.py`` has all of them."""

import data_order
import linear_maps
import numpy as np
import pca_recovery
import pytest
import svd_recovery

from fedmaestro.threads import one_thread

FAST = [0, 10]  # 10 is the slowest of the twenty: its first column starts near the second singular vector


@pytest.fixture(autouse=True)
def _single_thread() -> object:
    with one_thread():
        yield


def test_a_map_has_the_spectrum_and_the_singular_vectors_it_says() -> None:
    target = linear_maps.random_map(3)
    np.testing.assert_allclose(
        np.linalg.svd(target.matrix(), compute_uv=False), [9.55, 6.92, 3.67, 0, 0, 0], atol=1e-12
    )
    np.testing.assert_allclose(sum(target.terms()), target.matrix(), atol=1e-12)
    np.testing.assert_allclose(target.matrix() @ target.right[:, 3:], 0, atol=1e-12)
    assert not np.allclose(target.matrix(), linear_maps.random_map(4).matrix())


@pytest.mark.parametrize("seed", FAST)
def test_ordered_sampling_finds_the_singular_value_decomposition(seed: int) -> None:
    found = svd_recovery.recover_svd(seed)
    assert found.worst_prefix_error <= 1e-4
    assert found.worst_strength_error <= 0.1
    assert found.tail < 0.15


def test_it_is_the_sampling_that_orders_the_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """At full rank in each step the layer learns the same map, in no order."""
    monkeypatch.setattr(svd_recovery, "STEPS", 500)
    found = svd_recovery.recover_svd(0, ordered=False)
    assert found.prefix_errors[5] < 1e-6
    assert min(found.prefix_errors[:3]) > 0.1


def test_the_group_lasso_leaves_as_many_columns_as_the_data_have_dimensions() -> None:
    found = pca_recovery.recover_pca(0)
    assert found.kept == 3
    assert found.data_errors[2] <= 1e-2
    assert found.projection_error <= 1e-2
    assert min(found.strengths[:3]) > 0.8
    # Plain SGD of step η steps over a norm's minimum: with 7 suffixes of weight λ that hold the last column, each
    # factor ends 7·η·λ/2 from zero, and the importance is the product of the two.
    floor = (7 * pca_recovery.LR * pca_recovery.LASSO / 2) ** 2
    assert found.importances[9] == pytest.approx(floor, rel=0.05)
    assert floor < pca_recovery.THRESHOLD / 50


def test_the_order_of_the_columns_follows_the_data() -> None:
    found = data_order.recover_data_order(3)
    assert found.expected == pytest.approx((3.67, 6.92, 9.55))
    assert found.worst_prefix_error <= 1e-4
    assert found.worst_strength_error <= 0.1

"""Setups A, B and C on a few seeds; ``test_run.py`` has all of them."""

import data_order
import linear_maps
import numpy as np
import pca_recovery
import pytest
import svd_recovery

from fedmaestro import lod
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


def test_factors_start_as_two_linear_layers_do() -> None:
    """Uniform in ±1/√fan_in: of U the rank, of V the inputs; not the factors of an SVD."""
    layer = linear_maps.default_layer(9, 6, 0)
    assert (layer.u.shape, layer.v.shape, layer.bias) == ((9, 6), (6, 6), None)
    bound = 1 / np.sqrt(6)
    for factor in (layer.u, layer.v):
        assert 0.9 * bound < factor.abs().max() <= bound
    gram = (layer.v @ layer.v.T).detach()
    assert (gram - gram.diag().diag()).abs().max() > 0.05
    assert (lod.column_strengths(layer)[""].diff() > 0).any()  # in no order yet


def test_the_measure_is_zero_for_the_decomposition_itself() -> None:
    target = linear_maps.random_map(1)
    u, v = lod.balanced_svd(linear_maps.as_tensor(target.matrix()))
    found = linear_maps.measure(lod.LoDLinear(u, v, None), 1, target.terms())
    assert found.worst_prefix_error < 1e-12
    assert found.worst_strength_error < 1e-5
    assert found.tail < 1e-5
    assert found.passed
    wrong = linear_maps.measure(lod.LoDLinear(u, v, None), 1, target.terms()[::-1])
    assert wrong.prefix_errors[0] > 0.5
    assert wrong.prefix_errors[2] < 1e-12  # the same map in any order
    assert not wrong.passed


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


def test_a_seed_gives_the_same_result_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, recover in (
        (svd_recovery, svd_recovery.recover_svd),
        (pca_recovery, pca_recovery.recover_pca),
        (data_order, data_order.recover_data_order),
    ):
        monkeypatch.setattr(module, "STEPS", 30)
        assert recover(4) == recover(4)
        assert recover(4) != recover(5)


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


def test_the_inputs_of_setup_c_turn_the_energies_around() -> None:
    target = linear_maps.random_map(2)
    scales = data_order.input_scales()
    outputs = target.matrix() @ (target.right * scales)
    np.testing.assert_allclose(np.linalg.norm(outputs, axis=0)[:3], 0.25 * np.array([3.67, 6.92, 9.55]), rtol=1e-10)
    assert (np.diff(scales[:3]) > 0).all()


def test_the_order_of_the_columns_follows_the_data() -> None:
    found = data_order.recover_data_order(3)
    assert found.expected == pytest.approx((3.67, 6.92, 9.55))
    assert found.worst_prefix_error <= 1e-4
    assert found.worst_strength_error <= 0.1

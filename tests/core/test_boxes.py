import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grain_jax.core import boxes

pytestmark = pytest.mark.quick

unit = st.floats(0, 1, width=32)
size = st.floats(0.0625, 1, width=32)


def _giou_float64(a, b):
    """Written from Rezatofighi et al. 2019, a pair at a time."""
    area = lambda x: (x[2] - x[0]) * (x[3] - x[1])
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = area(a) + area(b) - w * h
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return w * h / union - (hull - union) / hull


@given(st.tuples(unit, unit, size, size))
@settings(deadline=None, max_examples=50)
def test_formats_round_trip(box):
    box = np.array(box, np.float32)
    back = boxes.xyxy_to_cxcywh(boxes.cxcywh_to_xyxy(box))
    np.testing.assert_allclose(back, box, atol=2e-7)


@given(st.tuples(unit, unit, size, size), st.tuples(unit, unit, size, size))
@settings(deadline=None, max_examples=50)
def test_giou_is_symmetric_bounded_and_equals_float64(a, b):
    a, b = (np.asarray(boxes.cxcywh_to_xyxy(np.array(x, np.float32))) for x in (a, b))
    value = float(boxes.giou(a, b))
    assert -1 <= value <= 1 + 1e-6
    np.testing.assert_allclose(value, float(boxes.giou(b, a)), atol=1e-6)
    np.testing.assert_allclose(value, _giou_float64(a.astype(float), b.astype(float)), atol=1e-5)


def test_known_values():
    a = jnp.array([0.0, 0.0, 0.5, 0.5])
    assert float(boxes.giou(a, a)) == 1
    half = jnp.array([0.0, 0.0, 0.5, 0.25])
    iou, union = boxes.iou_and_union(a, half)
    assert (float(iou), float(union)) == (0.5, 0.25)
    apart = jnp.array([0.5, 0.5, 1.0, 1.0])  # touching corners: no overlap, hull 1, union 0.5
    assert float(boxes.giou(a, apart)) == -0.5
    iou, _ = boxes.iou_and_union(a, a, epsilon=1e-4)
    np.testing.assert_allclose(float(iou), 0.25 / 0.2501, rtol=1e-6)


def test_padded_boxes_give_no_nan_in_value_or_gradient():
    nothing = jnp.zeros(4)
    value, grad = jax.value_and_grad(lambda b: boxes.giou(b, nothing))(nothing)
    assert float(value) == 0 and not np.isnan(grad).any()

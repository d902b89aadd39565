import numpy as np
import pytest

from grain_jax.inference import scores

pytestmark = pytest.mark.quick


def test_unit_keeps_zeros():
    np.testing.assert_allclose(scores.unit([[3.0, 4.0], [0.0, 0.0]]), [[0.6, 0.8], [0.0, 0.0]])


def test_class_feature_is_the_mean_normalised_again_on_demand():
    features = scores.class_features([np.array([[2.0, 0], [0, 5]]), np.array([[0.0, 3]])])
    np.testing.assert_allclose(features, [[0.5, 0.5], [0.0, 1.0]])
    unit = scores.class_features([np.array([[2.0, 0], [0, 5]]), np.array([[0.0, 3]])], True)
    np.testing.assert_allclose(unit, [[0.5**0.5, 0.5**0.5], [0.0, 1.0]], rtol=1e-6)
    np.testing.assert_allclose(scores.global_scores([[7.0, 0]], features), [[0.5, 0.0]])


def test_region_score_is_the_best_description_averaged_over_queries():
    descriptions = [np.array([[1.0, 0], [0, 2]]), np.array([[-3.0, 0]])]
    regions = np.array([[[1.0, 0], [0, -1]], [[0.6, 0.8], [0, 1]]])
    # Class 0: max(1, 0), max(0, -1); max(.6, .8), max(0, 1). Class 1: -1, 0; -.6, 0.
    np.testing.assert_allclose(
        scores.region_scores(regions, descriptions), [[0.5, -0.5], [0.9, -0.3]], atol=1e-7
    )
    # By the best query. Class 0: means of max(1, 0), max(0, -1) and of max(.6, 0), max(.8, 1). Class 1: 0; 0.
    best = scores.region_scores(regions, descriptions, "best")
    np.testing.assert_allclose(best, [[0.5, 0.0], [0.8, 0.0]], atol=1e-7)


def test_best_pairs_leave_out_what_overlaps_for_the_same_text():
    boxes = np.array([[0, 0, 1, 1], [0, 0, 1, 0.9], [0, 0, 0.5, 0.5], [0.5, 0, 1, 1]])
    score = np.array([[0.9, 0.1], [0.8, 0.7], [0.3, 0.6], [0.2, 0.5]])
    region, text = scores.best_pairs(score, boxes, 10, threshold=0.15)
    # Region 1 covers region 0 by 0.9: it is out for text 0, and region 0 is out for text 1. 3 has half of 0.
    assert [*zip(region, text)] == [(0, 0), (1, 1), (2, 1), (3, 1), (2, 0), (3, 0)]
    assert [*zip(*scores.best_pairs(score, None, 2))] == [(0, 0), (1, 0)]
    assert scores.best_pairs(np.zeros((0, 2)), np.zeros((0, 4)), 3)[0].size == 0


def test_only_boxes_that_are_kept_leave_out_others():
    """Three boxes, IoU 0.6 with the next and 0.33 over two: the second is out, the third is not."""
    boxes = np.array([[0, 0, 4, 1], [1, 0, 5, 1], [2, 0, 6, 1]])
    region, _ = scores.best_pairs(np.array([[0.9], [0.8], [0.7]]), boxes, 10)
    assert [*region] == [0, 2]


def test_boxes_leave_out_others_from_an_iou_of_one_half():
    boxes = np.array([[0, 0, 1, 1], [0, 0, 1, 0.52], [0, 0, 0.5, 1]])  # IoU .52 and .50 with the first
    region, _ = scores.best_pairs(np.array([[0.9], [0.8], [0.7]]), boxes, 10)
    assert [*region] == [0, 2]

import json

import pytest

from tests.evaluate.stub import StubPredictor, annotate, measure, region


def _write(folder, regions):
    lines = [{} if boxes is None else {"regions": [region(*x) for x in boxes]} for boxes in regions]
    return annotate(folder, lines)


TEXTS = {"beak": [1, 0, 0], "tail": [0, 1, 0], "crest": [0, 0, 1]}


def test_hand_computed(tmp_path):
    lines = [
        [([0, 0, 10, 10], "beak", 0.5), ([10, 0, 20, 10], "tail", 0.9)],
        [([0, 0, 20, 5], "Beak", 0.7), ([30, 0, 50, 10], "crest", 0.8)],  # the second lies outside
        None,
    ]
    options = _write(tmp_path, lines)
    regions = {
        # Queries: the right half exactly; the left quarter (IoU .5 with the left half).
        0: ([[0.5, 0, 1, 1], [0, 0, 0.25, 1]], [[0, 1, 0], [0, 0.4, 0.3]]),
        # The upper half exactly, and elsewhere.
        1: ([[0, 0.6, 0.1, 1], [0, 0, 1, 0.5]], [[1, 0, 0], [0.9, 0, 0.1]]),
    }
    predictor = StubPredictor({i: [1, 0, 0] for i in range(3)}, TEXTS, regions)
    result = measure("grounding", predictor, **options)
    assert predictor.asked == ["tail", "beak"]
    assert result["images"] == 2 and result["without_regions"] == 1
    assert result["regions"] == 3 == result["regions_matched"] and result["regions_outside"] == 1
    assert result["distinct_descriptions"] == 2
    assert result["box_iou"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert result["box_acc50"] == 1.0
    # Matched regions: tail right; beak's says tail, wrong; the second image's beak right.
    assert result["region_to_description_r1"] == pytest.approx(2 / 3)
    assert result["chance_region_to_description_r1"] == 0.5
    # Phrases: tail -> query 0 (IoU 1); beak -> both queries score 0: a tie of IoU 0 and .5;
    # image 1: beak -> query 0 (1 against .994), which lies elsewhere (IoU 0).
    assert result["phrase_iou"] == pytest.approx((1 + 0.25 + 0) / 3)
    assert result["phrase_acc50"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert result["chance_phrase_iou"] == pytest.approx((1 + 0.5 + 1) / 6)  # the others have 0
    # In the other image, no answer covers half of the phrase's box.
    assert result["phrase_acc50_other_image"] == 0
    # Boxes of the other image in place of the predicted ones: image 0 gets the upper half twice
    # (IoU 1/3 with either half). Image 1 gets two of the halves (IoU 1/3 each).
    assert result["chance_box_iou"] == pytest.approx(1 / 3)
    again = measure("grounding", predictor, **options, batch_size=1)
    assert again == result


def test_more_boxes_than_queries_keep_the_highest_scores(tmp_path):
    mine = [([0, 0, 2, 2], "beak", 0.1), ([0, 0, 20, 10], "tail", 0.9)]
    options = _write(tmp_path, [mine + [([0, 0, 10, 10], "crest", 0.5)]])
    regions = {0: ([[0, 0, 0.1, 0.2], [0, 0, 1, 1]], [[1, 0, 0], [0, 1, 0]])}
    result = measure("grounding", StubPredictor({0: [1, 0, 0]}, TEXTS, regions), **options)
    # beak's box is predicted exactly, but does not count; crest (IoU of 4 / 100) does.
    assert result["regions"] == 3 and result["regions_matched"] == 2
    assert result["box_iou"] == pytest.approx((1 + 0.04) / 2)
    assert 0 < result["chance_box_iou"] < 1  # of one image, too
    # The image is its own other one: beak and tail are right, crest ties a wrong box with half a right one.
    assert result["phrase_acc50_other_image"] == pytest.approx(2.5 / 3)


def test_phrases_with_several_boxes(tmp_path):
    phrase = "beak", "Beak", "tail", "tail"
    boxes = [0, 0, 10, 10], [10, 0, 20, 10], [0, 0, 20, 5], [90, 0, 99, 9]  # the last is outside
    first = [(box, word, 0.5) for box, word in zip(boxes, phrase)]
    options = _write(tmp_path, [first, [([0, 0, 20, 10], "beak", 0.5)]])
    # Query 0 says beak, and is the right half; query 1 says tail, and is the lower half.
    regions = {i: ([[0.5, 0, 1, 1], [0, 0.5, 1, 1]], [[1, 0, 0], [0, 1, 0]]) for i in range(2)}
    predictor = StubPredictor({0: [1, 0, 0], 1: [1, 0, 0]}, TEXTS, regions)
    result = measure("grounding", predictor, **options)
    # Each box is a phrase of its own: beak left (IoU 0), right (1); tail (0); the other image's beak (.5).
    assert (result["regions"], result["phrases"]) == (4, 4)
    assert result["phrase_iou"] == pytest.approx((0 + 1 + 0 + 0.5) / 4)
    assert result["phrase_acc50"] == 2 / 4
    # The other query overlaps either beak by 50 of 150 pixels, the tail 1/3 (query 0), the whole image .5.
    third = 1 / 3
    expected = (0 + third + 1 + third + third + 0 + 0.5 + 0.5) / 8
    assert result["chance_phrase_iou"] == pytest.approx(expected)

    first, second = options["annotations"].read_text().splitlines()
    first = json.loads(first) | {"phrases": [[0, 1], [2, 3], [0, 1], [3]]}
    first["regions"][1]["description"] = "beak"
    options["annotations"].write_text(json.dumps(first) + "\n" + second + "\n")
    result = measure("grounding", predictor, **options)
    # The tail keeps one box, the last phrase none. Merged, the two beaks are the whole image.
    assert (result["phrases"], result["phrases_of_several_boxes"]) == (4, 2)
    assert result["phrase_iou"] == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert result["phrase_acc50"] == 3 / 4 == result["phrase_acc50_any_box"]
    assert result["phrase_iou_merged_box"] == pytest.approx((0.5 + 0 + 0.5 + 0.5) / 4)
    assert result["phrase_acc50_merged_box"] == 3 / 4

    options["annotations"].write_text(json.dumps(first | {"phrases": []}) + "\n")
    result = measure("grounding", predictor, **options)
    assert result["phrases"] == 0 and "phrase_acc50" not in result and "box_iou" in result

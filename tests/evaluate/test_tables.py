"""Results as numbers and as tables of text."""

from grain_jax.evaluate import tables


def test_scalars():
    result = {
        "kind": "x",
        "n": 3,
        "names": True,
        "alpha_1.0": {"top1": 0.5, "per_class": {"a": 1.0}},
    }
    assert tables.scalars(result) == {"n": 3.0, "alpha_1.0/top1": 0.5}


def test_boxes_and_diagnostics_have_rows_of_their_own():
    numbers = {"found": 0.5, "found_low": 0.4, "found_high": 0.6, "boxes": 100.0, "chance": 0.1}
    numbers |= {"region/top1": 0.25, "found_boxes/region/top1": 0.5, "found_boxes/boxes": 50.0}
    table = tables.describe({"lvis": numbers, "run": {"matched_iou": 0.3, "regions_matched": 7.0}})
    rows = [" ".join(line.split()) for line in table.splitlines()[2:]]
    assert rows == [
        "lvis: found by a query, IoU >= 0.5 50.0% 40.0 - 60.0% 100 boxes",
        "lvis: class of a box by its region, top-1 25.0% 10.0% 100 boxes",
        "lvis: the same of those found 50.0% 10.0% 50 boxes",
        "run: matched box IoU 0.300 7 boxes",
    ]

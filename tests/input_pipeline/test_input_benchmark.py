import math

import numpy as np

from benchmarks import input as input_benchmark
from benchmarks import made


def test_psnr():
    a = np.full((4, 4, 3), 100, np.uint8)
    assert input_benchmark.psnr(a, a) == math.inf
    assert abs(input_benchmark.psnr(a, a + 1) - 20 * math.log10(255)) < 1e-9
    b = a.copy()
    b[:2] = 0  # below it by 100 in half of the numbers; unsigned differences would wrap around
    assert abs(input_benchmark.psnr(b, a) - 10 * math.log10(255**2 / 5000)) < 1e-9


def test_annotations_have_the_lengths_of_web_texts():
    lines = [made.annotation(number) for number in range(50)]
    assert lines[7] == made.annotation(7) != lines[8]
    assert {len(line["regions"]) for line in lines} == set(range(6))
    assert {8, 18} <= {len(line["caption"].split()) for line in lines} <= set(range(8, 19))
    boxes = np.array([region["box"] for line in lines for region in line["regions"]])
    assert (boxes >= 0).all() and (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes[:, 2:] <= [500, 375]).all()

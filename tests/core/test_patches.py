import numpy as np
import PIL.Image
import pytest
from transformers.models.siglip2 import image_processing_pil_siglip2, image_processing_siglip2

from grain_jax.core import images, patches

# Height and width: 5 aspect ratios from 4:1 to 1:4.
SHAPES = [(240, 60), (150, 100), (96, 96), (60, 113), (31, 124)]
LENGTHS = [16, 49, 100]
PATCH = 8


def photograph(height, width, seed=0):
    """Smooth noise with edges."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
    image = PIL.Image.fromarray(small).resize((width, height), PIL.Image.Resampling.BICUBIC)
    pixels = np.array(image)
    pixels[height // 3 : height // 2, width // 3 : width // 2] = (255, 0, 40)
    return pixels


def processed(module, pixels, length):
    """Pixels (not rescaled) and grid by an image processor of transformers."""
    of_pil = module is image_processing_pil_siglip2
    name = "Siglip2ImageProcessor" + "Pil" * of_pil
    processor = getattr(module, name)(
        patch_size=PATCH, max_num_patches=length, do_rescale=False, do_normalize=False
    )
    found = processor([pixels], return_tensors="np")
    assert found["pixel_attention_mask"][0].sum() == found["spatial_shapes"][0].prod()
    return np.asarray(found["pixel_values"][0], np.float32), found["spatial_shapes"][0]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_patches_are_those_of_siglip_2s_processor(shape, length):
    pixels = photograph(*shape)
    found = patches.of_image(pixels, PATCH, length)
    expected, grid = processed(image_processing_pil_siglip2, pixels, length)
    np.testing.assert_array_equal(found.grid, grid)
    np.testing.assert_array_equal(found.pixels, expected)
    # The one of torchvision rounds otherwise: by one level.
    expected, grid = processed(image_processing_siglip2, pixels, length)
    np.testing.assert_array_equal(found.grid, grid)
    assert np.abs(found.pixels - expected).max() <= 1


def test_grids_are_those_of_the_processors_search():
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(0, np.log(9000), (1500, 2))).astype(int)
    sizes = np.concatenate([sizes, [[1, 1], [1, 5000], [9000, 2], [512, 512], [640, 480]]])
    for length in (64, 256, 1024):
        search = image_processing_siglip2.get_image_size_for_max_num_patches
        expected = [search(int(h), int(w), 16, length) for h, w in sizes]
        found = np.stack(patches.grid(*sizes.T, 16, length), axis=1)
        np.testing.assert_array_equal(found * 16, expected)


def test_an_image_of_its_grid_stays_and_others_become_rgb():
    pixels = photograph(24, 40)
    found = patches.of_image(pixels, 8, 15)
    np.testing.assert_array_equal(found.grid, [3, 5])
    np.testing.assert_array_equal(found.pixels[7].reshape(8, 8, 3), pixels[8:16, 16:24])
    grey = patches.of_image(PIL.Image.new("L", (90, 30), 7), 8, 20)
    np.testing.assert_array_equal(grey.grid, [2, 6])
    assert (grey.pixels[:12] == 7).all() and (grey.pixels[12:] == 0).all()
    with pytest.raises(images.ImageError, match=r"float64 \[3, 3\], expected uint8"):
        patches.of_image(np.zeros((3, 3)), 8, 20)

import pytest
import tensorflow as tf

from grain_jax.core import images
from grain_jax.data import example
from grain_jax.input_pipeline import transforms
from tests.hostile import image_files

pytestmark = pytest.mark.filterwarnings("ignore:label:DeprecationWarning")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_no_mutated_image_is_accepted_that_training_refuses(kind):
    original, accepted, rescued = example.Encoding("original"), 0, 0
    seeds = [image_files.encode(kind), image_files.encode(kind, (61, 47))]
    for number in range(200):
        encoded = image_files.mutate(seeds[number % 2], number)
        try:
            picture = images.decode_image(encoded)
        except images.ImageError:
            continue
        stored, anew = example.encode_image(picture, encoded, original)
        decoded = transforms.decode(tf.constant(stored)).numpy()  # raises where training would
        assert decoded.shape == (picture.height, picture.width, 3)
        accepted, rescued = accepted + 1, rescued + anew
        assert (stored == encoded) != anew
    assert accepted > 20
    assert rescued > 10 or kind == "JPEG"

"""Inputs of GRAIN: images resized to a square (bicubic), texts cleaned and in tokens."""

import html
import re
import string

import numpy as np
import PIL.Image
import PIL.ImageOps
from transformers import BatchFeature, ImageProcessingMixin, ProcessorMixin
from transformers.processing_utils import ImagesKwargs


class GrainImageProcessor(ImageProcessingMixin):
    """Resizes images to a square (no crop; the aspect ratio is not kept) and normalises them.

    Args:
      size: {"height": S, "width": S}, pixels.
      image_mean, image_std: of pixels in [0, 1], three each.
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = ImagesKwargs  # options that pipelines pass

    def __init__(self, size=None, image_mean=None, image_std=None, **kwargs):
        super().__init__(**kwargs)
        self.size, self.image_mean, self.image_std = size, image_mean, image_std

    def __call__(self, images, return_tensors="pt"):
        """A PIL image, a uint8 array [H, W, 3], or a list of either -> pixel_values [B, 3, S, S].

        PIL images are turned by their EXIF orientation, as a viewer shows them.
        """
        if isinstance(images, PIL.Image.Image) or getattr(images, "ndim", 4) == 3:
            images = [images]
        mean, std = (np.array(x, np.float32) for x in (self.image_mean, self.image_std))
        pixels = np.stack([self._resize(image) for image in images]).astype(np.float32) / 255
        pixels = ((pixels - mean) / std).transpose(0, 3, 1, 2)
        return BatchFeature({"pixel_values": np.ascontiguousarray(pixels)}, tensor_type=return_tensors)

    def _resize(self, image):
        if not isinstance(image, PIL.Image.Image):
            image = PIL.Image.fromarray(np.asarray(image))
        # RGB before the resize: palette indices cannot be interpolated.
        image = PIL.ImageOps.exif_transpose(image).convert("RGB")
        wanted = (self.size["width"], self.size["height"])
        if image.size != wanted:
            image = image.resize(wanted, PIL.Image.Resampling.BICUBIC)
        return np.asarray(image)


class GrainProcessor(ProcessorMixin):
    """Images and texts to the inputs of the model.

    Args:
      image_processor, tokenizer: of images and texts.
      cleaning: of texts, as in training. "lower" repairs broken encodings (with ftfy), HTML entities and
        white space, and makes lower case. "siglip" removes case, ASCII punctuation and repeated spaces;
        "canonical" also makes "_" a space. "siglip2" makes lower case. "none" does nothing.
    """

    def __init__(self, image_processor=None, tokenizer=None, cleaning="lower", **kwargs):
        super().__init__(image_processor, tokenizer, **kwargs)
        self.cleaning = cleaning

    def __call__(self, images=None, text=None, return_tensors="pt", **kwargs):
        """Images, texts (a string or a list), or both -> pixel_values and input_ids.

        Args:
          images: as for `GrainImageProcessor`.
          text: cut to the context length of the model; padded to the longest text.
          kwargs: options of the tokenizer, such as padding.
        """
        out = BatchFeature()
        if images is not None:
            out.update(self.image_processor(images, return_tensors))
        if text is not None:
            clean = CLEANINGS[self.cleaning]
            texts = [clean(t) for t in ([text] if isinstance(text, str) else text)]
            options = {"padding": True, "truncation": True} | kwargs
            out["input_ids"] = self.tokenizer(texts, return_tensors=return_tensors, **options)["input_ids"]
        return out


def _lower(text):
    if not (text.isascii() and text.isprintable() and "&" not in text):
        try:
            import ftfy

            text = ftfy.fix_text(text)
        except ImportError:
            pass  # optional: it only repairs broken encodings
        text = html.unescape(html.unescape(text))
    return re.sub(r"\s+", " ", text).strip().lower()


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


CLEANINGS = {
    "lower": _lower,
    "canonical": lambda t: " ".join(t.replace("_", " ").translate(_NO_PUNCTUATION).lower().split()),
    "siglip": lambda t: " ".join(t.lower().translate(_NO_PUNCTUATION).split()),
    "siglip2": lambda t: "".join(map(str.lower, t)),
    "none": str,
}

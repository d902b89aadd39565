"""Inputs of GRAIN: images resized to a square (bicubic) or in their own shape, texts cleaned and in tokens."""

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
      patch_size, max_num_patches: of a model that takes images in their own shape.
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = ImagesKwargs  # options that pipelines pass

    def __init__(
        self,
        size=None,
        image_mean=None,
        image_std=None,
        patch_size=None,
        max_num_patches=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.size, self.image_mean, self.image_std = size, image_mean, image_std
        self.patch_size, self.max_num_patches = patch_size, max_num_patches

    def __call__(self, images, return_tensors="pt", max_num_patches=None):
        """A PIL image, a uint8 array [H, W, 3], or a list of either -> pixel_values [B, 3, S, S].

        Of a model that takes images in their own shape pixel_values [B, max_num_patches, patch_size ** 2 * 3],
        pixel_attention_mask [B, max_num_patches] and spatial_shapes [B, 2], rows and columns of patches. PIL images are
        turned by their EXIF orientation, as a viewer shows them.
        """
        if isinstance(images, PIL.Image.Image) or getattr(images, "ndim", 4) == 3:
            images = [images]
        mean, std = (np.array(x, np.float32) for x in (self.image_mean, self.image_std))
        # <shapes>
        most = max_num_patches or self.max_num_patches
        if most:
            found = [self._patches(self._image(image), most, mean, std) for image in images]
            names = "pixel_values", "pixel_attention_mask", "spatial_shapes"
            stacked = {name: np.stack(x) for name, x in zip(names, zip(*found))}
            return BatchFeature(stacked, tensor_type=return_tensors)
        # </shapes>
        pixels = np.stack([self._resize(image) for image in images]).astype(np.float32) / 255
        pixels = ((pixels - mean) / std).transpose(0, 3, 1, 2)
        return BatchFeature(
            {"pixel_values": np.ascontiguousarray(pixels)}, tensor_type=return_tensors
        )

    # <shapes>
    def _patches(self, image, most, mean, std):
        """A PIL image -> its patches row by row, then zeros; which are real; rows and columns.

        One scale for both sides, the largest whose grid, rounded up to whole patches, has at most `most` (NaFlex).
        """
        sides = np.array([image.height, image.width]) / self.patch_size
        grid_at = lambda scale: np.maximum(np.ceil(scale * sides), 1).astype(np.int64)
        low, high = 1e-6, 100.0
        while high - low >= 1e-5:
            scale = (low + high) / 2
            low, high = (scale, high) if grid_at(scale).prod() <= most else (low, scale)
        rows, columns = grid = grid_at(low)
        p = self.patch_size
        wanted = (int(columns) * p, int(rows) * p)
        if image.size != wanted:
            image = image.resize(wanted, PIL.Image.Resampling.BILINEAR)
        pixels = (np.asarray(image, np.float32) / 255 - mean) / std
        patches = pixels.reshape(rows, p, columns, p, 3).swapaxes(1, 2).reshape(rows * columns, -1)
        there = (np.arange(most) < len(patches)).astype(np.int64)
        return np.pad(patches, [(0, most - len(patches)), (0, 0)]), there, grid

    # </shapes>
    def _resize(self, image):
        wanted = (self.size["width"], self.size["height"])
        image = self._image(image)
        if image.size != wanted:
            image = image.resize(wanted, PIL.Image.Resampling.BICUBIC)
        return np.asarray(image)

    def _image(self, image):
        """A PIL image, upright and RGB."""
        if not isinstance(image, PIL.Image.Image):
            array = np.asarray(image)
            if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
                raise ValueError(
                    f"images: got an array {array.dtype} {list(array.shape)}, expected PIL images"
                    " or uint8 [H, W, 3]"
                )
            image = PIL.Image.fromarray(array)
        image = PIL.ImageOps.exif_transpose(image)
        return image.convert("RGB")  # before the resize: palette indices cannot be interpolated


class GrainProcessor(ProcessorMixin):
    """Images and texts to the inputs of the model.

    Args:
      image_processor, tokenizer: of images and texts.
      cleaning: of texts, as in training: "lower" (broken encodings, if ftfy is installed, HTML entities and white space
        repaired, lower case), "canonical" (lower case, no ASCII punctuation, single spaces) or "none".
    """

    def __init__(self, image_processor=None, tokenizer=None, cleaning="lower", **kwargs):
        super().__init__(image_processor, tokenizer, **kwargs)
        self.cleaning = cleaning

    def __call__(self, images=None, text=None, return_tensors="pt", max_num_patches=None, **kwargs):
        """Images, texts (a string or a list), or both -> pixel_values and input_ids.

        Args:
          images, max_num_patches: as for `GrainImageProcessor`.
          text: cut to the context length of the model; padded to the longest text.
          kwargs: options of the tokenizer, such as padding.
        """
        out = BatchFeature()
        if images is not None:
            out.update(self.image_processor(images, return_tensors, max_num_patches))
        if text is not None:
            clean = CLEANINGS[self.cleaning]
            texts = [clean(t) for t in ([text] if isinstance(text, str) else text)]
            options = {"padding": True, "truncation": True} | kwargs
            out["input_ids"] = self.tokenizer(texts, return_tensors=return_tensors, **options)[
                "input_ids"
            ]
        return out

    def batch_decode(self, sequences, **kwargs):
        """Token ids that the text decoder wrote, [..., n] -> texts, in lists where there are more axes than two.

        Ids beyond the tokenizer's, as of tasks, ends and boxes, are left out.
        """
        rows = sequences.tolist() if hasattr(sequences, "tolist") else sequences
        if rows and not isinstance(rows[0], int) and rows[0] and not isinstance(rows[0][0], int):
            return [self.batch_decode(each, **kwargs) for each in rows]
        return [self.decode(row, **kwargs) for row in rows]

    def decode(self, token_ids, skip_special_tokens=True, **kwargs):
        """The ids [n] of a text -> the text, as `batch_decode`."""
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        known = [i for i in ids if i < len(self.tokenizer)]
        options = {"skip_special_tokens": skip_special_tokens} | kwargs
        return self.tokenizer.decode(known, **options).strip()


def _lower(text):
    if not (text.isascii() and text.isprintable() and "&" not in text):
        try:
            import ftfy

            text = ftfy.fix_text(text)
        except ImportError:
            pass  # optional: it only repairs broken encodings
        text = html.unescape(html.unescape(text))
    return re.sub(r"\s+", " ", text).strip().lower()


def _canonical(text):
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


CLEANINGS = {"lower": _lower, "canonical": _canonical, "none": str}

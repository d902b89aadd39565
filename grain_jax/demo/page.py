"""The page, of Gradio's own components; the only module that imports Gradio.

It makes no request to any network: no fonts, no analytics, no sharing. A user error is one line in the page.
"""

import functools
import html
import os
from collections.abc import Callable, Sequence
from typing import Any

# Read when Gradio and huggingface_hub are imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_OFFLINE"] = "1"

import gradio as gr
import numpy as np
import PIL.Image
from gradio import themes

from grain_jax import inference
from grain_jax.core import errors, images, schema
from grain_jax.demo import class_lists
from grain_jax.inference import scores

_PROPOSALS = 5  # of the boxes of an image's patches


class Views:
    """What the page shows of a model; each method takes its inputs, and raises errors.UserError."""

    def __init__(self, predictor: inference.Predictor):
        self.predictor = predictor
        try:
            predictor.maps_by("auto", "auto")
            self.has_maps = predictor.grid > 0
        except inference.InputError:
            self.has_maps = False
        self._features = functools.lru_cache(16)(lambda text: predictor.class_features(_given(text)))

    def warm_up(self) -> None:
        """Compiles what the page calls, so that its first answer is quick."""
        size = self.predictor.model.image.image_size
        self.predictor.warm_up()
        if self.has_maps:
            self.predictor.similarity_map(PIL.Image.new("RGB", (size, size)), ["a"])

    def scores(self, path: str | None, text: str, alpha: float) -> tuple[list[list[Any]], Any]:
        """Rows of class, score and softmax, best first; and the image with its described regions."""
        image, classes = read_image(path), class_lists.parse(text)
        features, texts = self._features(text), sum(classes.values(), [])
        has_regions = self.predictor.has_regions
        alpha = alpha if has_regions and texts else 1.0
        cosines = self.predictor.classify([image], features, alpha)[0]
        odds = np.exp(self.predictor.logit_scale * (cosines - cosines.max()).astype(np.float64))
        rows = [
            [list(classes)[c], round(float(cosines[c]), 4), f"{odds[c] / odds.sum():.1%}"]
            for c in np.argsort(-cosines, kind="stable")
        ]
        if not has_regions:
            return rows, None
        regions = self.predictor.encode_regions([image])
        if self.predictor.has_proposals:
            regions = scores.likeliest(regions, _PROPOSALS)
        regions = schema.Regions(*(x[0] for x in regions))
        labels = [f"region {q + 1}" for q in range(len(regions.embed))]
        if texts:
            each = regions.embed @ np.concatenate(features.descriptions or ()).T  # [Q, texts]
            best = [f"{texts[row.argmax()]} ({row.max():.2f})" for row in each]
            labels = [f"{label}: {said}" for label, said in zip(labels, best)]
        return rows, _boxed(image, regions.boxes_xyxy, labels)

    def find(self, path: str | None, text: str) -> tuple[Any, list[tuple[PIL.Image.Image, str]]]:
        """Where phrases, with `;` between them, are: the image with a box for each, and a map of each."""
        image, phrases = read_image(path), [x.strip() for x in text.split(";") if x.strip()]
        class_lists.check(phrases)
        boxed, maps = None, []
        if self.predictor.has_regions:
            answers = self.predictor.ground(image, phrases)
            labels = [f"{phrase} ({x.score:.2f})" for phrase, x in zip(phrases, answers)]
            boxed = _boxed(image, [answer.box_xyxy for answer in answers], labels)
        if self.has_maps:
            cosines = self.predictor.similarity_map(image, phrases)
            image.thumbnail((480, 480))
            for heat, phrase in zip(scores.resize_map(cosines, *image.size), phrases):
                share = (heat - heat.min()) / max(np.ptp(heat), 1e-6) * 0.8
                pixels = np.asarray(image) * (1 - share[..., None]) + share[..., None] * (255, 140, 0)
                maps.append((PIL.Image.fromarray(pixels.astype(np.uint8)), phrase))
        return boxed, maps

    def segment(self, path: str | None, text: str) -> Any:
        """The image with a mask for each class that has pixels."""
        image = read_image(path)
        labels = self.predictor.segment(image, _given(text))
        names = enumerate(class_lists.parse(text))
        return image, [(labels == c, name) for c, name in names if (labels == c).any()]


def _given(text: str) -> Any:
    """Classes as the predictor takes them."""
    classes = class_lists.parse(text)
    return classes if any(classes.values()) else list(classes)


def read_image(path: str | None) -> PIL.Image.Image:
    """The image at `path` as RGB. Raises errors.UserError where there is none or it cannot be read."""
    if not path:
        raise errors.UserError("no image; drop one, or choose an example")
    return images.to_rgb(images.load_image(path))


def _boxed(image: PIL.Image.Image, boxes_xyxy: Any, labels: Sequence[str]) -> tuple[Any, list[Any]]:
    """An image, enlarged if small, with boxes [n, 4] in [0, 1] and labels, for gr.AnnotatedImage."""
    share = max(1, 480 / max(image.size))
    image = image.resize([round(share * edge) for edge in image.size])
    pixels = np.rint(np.array(boxes_xyxy) * [*image.size, *image.size]).astype(int)
    return image, [(tuple(box), label) for box, label in zip(pixels.tolist(), labels)]


def _shown(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose UserError becomes a line on the page."""

    def call(*values: Any) -> Any:
        try:
            return function(*values)
        except errors.UserError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from None

    return call


def build(views: Views, classes: class_lists.Classes, examples: Sequence[str]) -> gr.Blocks:
    """The page, with the classes and the examples (image files that Gradio may read) to start with."""
    with_regions, with_maps = views.predictor.has_regions, views.has_maps
    queue = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
    info = "One a line: name: description; description. Or names alone."
    with gr.Blocks(title="grain_jax", delete_cache=(600, 3600)) as page:
        gr.Markdown(f"## grain_jax: what the model sees\n`{views.predictor}`")
        with gr.Row():
            with gr.Column():
                image = gr.Image(label="Image", type="filepath", image_mode=None)
                # `read_image` reads the file, within bounds and with a line about what is wrong.
                image.preprocess = lambda payload: payload.path if payload else None
                if examples:
                    gr.Examples(list(examples), image)
                text = gr.Textbox(class_lists.format(classes), label="Classes", info=info, lines=6)
                alpha = gr.Slider(0, 1, 0.5, label="alpha: share of the image", visible=with_regions)
                go = gr.Button("Score", variant="primary")
            with gr.Column():
                header = ["class", "score", "softmax"]
                table = gr.Dataframe(headers=header, label="Scores", interactive=False)
                regions = gr.AnnotatedImage(label="Regions", visible=with_regions)
        events = [go.click, image.change, alpha.release]
        gr.on(events, _shown(views.scores), [image, text, alpha], [table, regions], **queue)
        if with_regions or with_maps:
            phrase = gr.Textbox(label="Where is it?", info="a long orange beak; a tail. Then Enter")
            with gr.Row():
                boxed = gr.AnnotatedImage(label="The best region", visible=with_regions)
                maps = gr.Gallery(label="Similarity maps", visible=with_maps)
            phrase.submit(_shown(views.find), [image, phrase], [boxed, maps], **queue)
        if with_maps:
            cut = gr.Button("Which class is each pixel?")
            segmented = gr.AnnotatedImage(label="Classes of pixels", height=480)
            cut.click(_shown(views.segment), [image, text], segmented, **queue)
    return page.queue(max_size=100, api_open=False)


def launch(page: gr.Blocks, host: str, port: int | None, examples: str) -> str:
    """Starts the server (port None: the first free one from 7860); returns its URL. Raises OSError."""
    options: dict[str, Any] = dict(share=False, ssr_mode=False, pwa=False, mcp_server=False)
    options |= dict(quiet=True, prevent_thread_lock=True, footer_links=[], max_file_size=32 << 20)
    options["theme"] = themes.Base(font=["sans-serif"], font_mono=["monospace"])  # none is fetched
    options |= dict(server_name=host, server_port=port, allowed_paths=[examples])
    return page.launch(**options)[1]

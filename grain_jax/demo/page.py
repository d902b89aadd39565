"""The Gradio page around `analysis` and `views`; the only module that imports Gradio.

It makes no request to any network: no fonts, no analytics, no sharing. A user error is one line in the page.
"""

import functools
import os
from collections.abc import Sequence
from typing import Any, Literal, NotRequired, TypedDict

# Read when Gradio and huggingface_hub are imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr
from etils import epath
from gradio import themes
from starlette import middleware

from grain_jax.core import annotations, errors, regular_file
from grain_jax.demo import analysis, class_lists, guard, views

_UPLOADS_KEPT = 3600  # seconds
_WAITING = 100  # calls at most


class _Meta(TypedDict):
    _type: Literal["gradio.FileData"]


class _Upload(TypedDict):
    """What the page sends of an uploaded file."""

    path: str
    meta: _Meta
    url: NotRequired[str | None]
    size: NotRequired[int | None]
    orig_name: NotRequired[str | None]
    mime_type: NotRequired[str | None]
    is_stream: NotRequired[bool]


def build(
    analyst: analysis.Analyst, model: str, classes: class_lists.Classes, examples: Sequence[str]
) -> gr.Blocks:
    """The page.

    Args:
      analyst: the model.
      model: Markdown that describes the model.
      classes: the classes at the start.
      examples: image files to choose from, in a folder that Gradio may read.
    """
    with_regions = analyst.queries > 0
    start = views.hint("Drop an image, or choose an example.")
    kept = (_UPLOADS_KEPT // 6, _UPLOADS_KEPT)
    with gr.Blocks(title="grain_jax", analytics_enabled=False, delete_cache=kept) as page:
        gr.Markdown(f"## grain_jax: what the model sees\n{model}")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                image = gr.Image(
                    label="Image",
                    type="filepath",
                    # By default Gradio decodes the file itself, in any format.
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    buttons=[],
                    height=240,
                    elem_id="image",
                )
                written = gr.HTML(elem_id="caption") if analyst.writes else None
                if examples:
                    gr.Examples(list(examples), image, examples_per_page=12, elem_id="examples")
                text = gr.Textbox(
                    class_lists.format(classes) if classes else "",
                    label="Classes",
                    info="One a line: name: description; description. Or names alone.",
                    lines=6,
                    max_lines=12,
                    elem_id="classes",
                )
                with gr.Row():
                    file = gr.UploadButton("Load D.json or names.txt", size="sm", elem_id="file")
                    go = gr.Button("Score", variant="primary", size="sm", elem_id="go")
            with gr.Column(scale=3, min_width=320):
                message = gr.HTML(elem_id="message")
                gr.Markdown("### Scores")
                with gr.Row():
                    alpha = gr.Slider(
                        0,
                        1,
                        0.5 if with_regions else 1.0,
                        step=0.05,
                        label="alpha: share of the whole image",
                        visible=with_regions,
                        scale=3,
                        elem_id="alpha",
                    )
                    softmax = gr.Checkbox(False, label="Softmax", min_width=100, elem_id="softmax")
                table = gr.HTML(start, elem_id="scores")
                with gr.Column(visible=with_regions):
                    gr.Markdown("### Regions")
                    with gr.Row():
                        most = gr.Slider(
                            1,
                            max(2, analyst.queries),
                            max(1, analyst.queries),
                            step=1,
                            label="At most",
                            elem_id="most",
                        )
                        threshold = gr.Slider(
                            -1, 1, -1, step=0.01, label="Cosine at least", elem_id="threshold"
                        )
                    boxes = gr.HTML(elem_id="regions")
        with gr.Column(visible=analyst.box_head or with_regions or analyst.writes):
            gr.Markdown("### Draw a box: what is it?")
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    canvas = gr.HTML(start, elem_id="canvas", js_on_load=views.DRAW)
                    box = gr.Textbox(
                        label="Box",
                        info="Drag one on the image; or type x1 y1 x2 y2 in percent of it, then Enter.",
                        placeholder="10 20 50 60",
                        elem_id="box",
                    )
                with gr.Column(scale=3, min_width=320):
                    boxed = gr.HTML(elem_id="boxed")
        with gr.Column(visible=bool(with_regions or analyst.grid or analyst.writes)):
            gr.Markdown("### Type a text: where is it?")
            phrase = gr.Textbox(
                label="Find a phrase",
                info="Several with ; between them. Enter finds them.",
                placeholder="a long orange beak",
                elem_id="phrase",
            )
            found = gr.HTML(elem_id="found")
        with gr.Column(visible=analyst.grid > 0):
            gr.Markdown("### Which class is each pixel?")
            with gr.Row():
                cut = gr.Button("Segment", variant="primary", size="sm", scale=0, elem_id="segment")
            segmented = gr.HTML(elem_id="segmented")
        gr.Markdown("### Why")
        chosen = gr.Dropdown(
            [("the best one", "")], value="", label="Explain the class", elem_id="chosen"
        )
        reasons = gr.HTML(elem_id="why")

        # Gradio's own checks end in a traceback: of a file that is no image, a number outside its
        # slider, a class that was there a moment ago. `everything` copes with all of them.
        image.preprocess = lambda payload: payload.path if payload else None
        chosen.preprocess = lambda payload: payload
        for slider in (alpha, most, threshold):
            slider.preprocess = functools.partial(_within, slider)

        def everything(path, text, alpha, softmax, chosen, most, threshold):
            try:
                image = analysis.read_image(path)
                classes = class_lists.parse(text)
                result = analyst.analyse(image, classes, alpha)
            except errors.UserError as error:
                return views.message(str(error)), "", "", "", gr.skip()
            chosen = chosen if chosen in classes else ""
            return (
                "",
                views.scores(result, softmax=softmax, chosen=chosen),
                views.why(result, chosen),
                views.regions(image, result, most=int(most), threshold=threshold),
                gr.Dropdown([("the best one", ""), *classes], value=chosen),
            )

        def numbers(*given):
            return everything(*given)[:3]

        def regions(*given):
            said, _, _, shown, _ = everything(*given)
            return said, shown

        def find(path, phrase):
            try:
                image = analysis.read_image(path)
                phrases = [part.strip() for part in phrase.split(";") if part.strip()]
                return views.places(image, analyst.find(image, phrases))
            except errors.UserError as error:
                return views.message(str(error))

        def segment(path, text):
            try:
                image, classes = analysis.read_image(path), class_lists.parse(text)
                return views.segmented(image, analyst.segment(image, classes), list(classes))
            except errors.UserError as error:
                return views.message(str(error))

        def clear(path):
            try:
                empty = views.canvas(analysis.read_image(path))
            except errors.UserError:  # `everything` says so
                empty = start
            return empty, "", "", "", ""

        def inside(path, text, box):
            if not box.strip():
                return ""
            try:
                corners = analysis.read_box(box)
                image, classes = analysis.read_image(path), class_lists.parse(text)
                return views.inside(analyst.inside(image, classes, corners))
            except errors.UserError as error:
                return views.message(str(error))

        def caption(path):
            try:
                return views.caption(analyst.caption(analysis.read_image(path)))
            except errors.UserError:  # `everything` says so
                return ""

        def load(path):
            try:
                return "", class_lists.format(class_lists.read(path))
            except errors.UserError as error:
                return views.message(str(error)), gr.skip()

        given = [image, text, alpha, softmax, chosen, most, threshold]
        shown = [message, table, reasons, boxes, chosen]
        # One at a time: the model's caches are shared.
        one = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        last = {**one, "trigger_mode": "always_last", "show_progress": "hidden"}
        gr.on([go.click, text.submit, image.change], everything, given, shown, **one)
        gr.on([alpha.change, softmax.change, chosen.input], numbers, given, shown[:3], **last)
        gr.on([most.change, threshold.change], regions, given, [message, boxes], **last)
        phrase.submit(find, [image, phrase], found, **one)
        cut.click(segment, [image, text], segmented, **one)
        image.change(
            clear,
            image,
            [canvas, box, boxed, found, segmented],
            api_visibility="private",
            show_progress="hidden",
        )
        loaded = file.upload(load, file, [message, text], **one)
        loaded.success(everything, given, shown, **one)
        # The script of the canvas makes its event when a box is drawn.
        asked = [box.submit, canvas.input, go.click, text.submit]
        gr.on(asked, inside, [image, text, box], boxed, **one)
        loaded.success(inside, [image, text, box], boxed, **one)
        if written is not None:
            image.change(caption, image, written, **one)
    return page.queue(max_size=_WAITING, api_open=False)


def check(page: gr.Blocks, folder: str, event: Any, values: Any) -> None:
    """Raises ValueError for inputs of an event that the page itself does not send.

    Args:
      page: the page that `build` returned.
      folder: folder of the uploads; no other file may be read.
      event: number of the event, `fn_index` of the request.
      values: values of its inputs, `data` of the request.
    """
    if type(event) is not int or event not in page.fns:
        raise ValueError(f"fn_index: got {annotations.show(event)}, expected a number of the page")
    inputs = page.fns[event].inputs
    if not isinstance(values, list) or len(values) != len(inputs):
        raise ValueError(f"data: expected a list of {len(inputs)} values")
    for index, (component, value) in enumerate(zip(inputs, values)):
        expected = _expected(component, value, folder)
        if expected:
            got = annotations.show(value)
            raise ValueError(f"data[{index}]: got {got}, expected {expected}")


def _expected(component: object, value: Any, folder: str) -> str:
    """The expected value of a component, in words; "" if `value` is valid."""
    match component:
        case gr.Image():
            fits = value is None or _is_upload(value, folder)
            return "" if fits else "null or an image that was uploaded here"
        case gr.UploadButton():
            return "" if _is_upload(value, folder) else "a file that was uploaded here"
        case gr.Textbox():
            return "" if isinstance(value, str) else "a text"
        case gr.Dropdown():
            return "" if value is None or isinstance(value, str) else "a text"
        case gr.Checkbox():
            return "" if isinstance(value, bool) else "true or false"
        case gr.Slider():
            number = value is None or (isinstance(value, int | float) and abs(value) < 1e9)
            return "" if number else "a number"
        case gr.Dataset():
            fits = type(value) is int and 0 <= value < len(component.raw_samples or ())
            return "" if fits else "the number of an example"
    return "a component of the page"


def _is_upload(value: Any, folder: str) -> bool:
    try:
        path = regular_file.checked(value, _Upload, "data", "an upload")["path"]
    except regular_file.FileError:
        return False
    if not path.startswith("/") or "\0" in path:
        return False
    file = epath.Path(path).resolve()
    return file.is_relative_to(epath.Path(folder).resolve()) and file.is_file()


def _within(slider: gr.Slider, payload: float | None) -> float:
    """The nearest value of the slider; its initial value if there is none."""
    value = float(slider.value or 0) if payload is None else payload
    return min(max(value, slider.minimum), slider.maximum)


def launch(page: gr.Blocks, host: str, port: int | None, *, uploads: str, examples: str) -> str:
    """Starts the server of the page at an address; returns its URL.

    Args:
      page: the page that `build` returned.
      host: address to listen on.
      port: None for the first free one from 7860.
      uploads: folder of uploaded files; browsers download them and never display them.
      examples: folder of the examples, served as they are; it must hold no upload.

    Raises:
      class_lists.DemoError: no port is free.
    """
    guarded = middleware.Middleware(
        guard.Guard, folder=uploads, check=functools.partial(check, page, uploads)
    )
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            run_history=False,
            footer_links=[],
            allowed_paths=[examples],
            max_file_size=guard.MAX_FILE,
            app_kwargs={"middleware": [guarded]},
            theme=themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]).set(
                # The default colours of Gradio are too pale to read.
                block_info_text_color="*neutral_600",
                block_info_text_color_dark="*neutral_300",
                block_label_text_color="*neutral_700",
            ),
            css=views.CSS,
        )
    except OSError as error:
        raise class_lists.DemoError(f"--port: {' '.join(str(error).split())}") from None
    return url

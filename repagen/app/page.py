"""The page itself, made with gradio; imported only where the page is served."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from repagen.app.drawing import MAX_IMAGES, Drawing, DrawingRequest, draw
from repagen.errors import UserError

_THUMBNAIL_PX = 96


@dataclass(frozen=True)
class Side:
    """One model on the page.

    Attributes:
        title: stands above its images.
        pipe: a `ClassToImagePipeline`.
    """

    title: str
    pipe: Any


class Page:
    """What happens on the page: one drawing at a time, for all visitors together.

    Args:
        sides: one model, or two that draw the same request one after the other.
    """

    def __init__(self, sides: Sequence[Side]) -> None:
        self.sides = list(sides)
        self._stops: dict[str, threading.Event] = {}  # of the visitors that wait for a drawing

    def class_names(self) -> list[str]:
        """Names of the classes of all models, ids where they have no names; empty if none has classes."""
        names: dict[str, None] = {}
        for side in self.sides:
            id2label = side.pipe.config["id2label"] or {}
            classes = range(side.pipe.transformer.config.num_classes)
            names |= {id2label.get(str(label), str(label)): None for label in classes}
        return list(names)

    def draw(self, visitor: str, request: DrawingRequest) -> Iterator[tuple[str, list[Drawing | None]]]:
        """Draw a request with every model and yield what to say and the state of each side.

        Raises:
            UserError: a model refuses the request; nothing was drawn then.
        """
        stop = self._stops[visitor] = threading.Event()
        drawings: list[Drawing | None] = [None] * len(self.sides)
        for number, side in enumerate(self.sides):
            for drawing in draw(side.pipe, request, stop):
                drawings[number] = drawing
                yield f"{side.title}: step {drawing.step} of {drawing.num_steps}", list(drawings)
            if stop.is_set() and (drawings[number] is None or drawings[number].images is None):  # type: ignore[union-attr]
                yield "stopped", list(drawings)
                return
        yield "done", list(drawings)

    def stop(self, visitor: str) -> None:
        """Let a visitor's drawing end with its running step."""
        if visitor in self._stops:
            self._stops[visitor].set()


def build_page(page: Page) -> gr.Blocks:
    """Lay the page out; nothing on it is fetched from elsewhere."""
    first = page.sides[0].pipe.sampling_options({})
    names = page.class_names()
    with gr.Blocks(title="repagen", analytics_enabled=False) as blocks:
        gr.Markdown("# repagen\n" + " beside ".join(f"`{side.title}`" for side in page.sides))
        with gr.Row():
            with gr.Column(scale=1):
                label = gr.Dropdown(
                    names, value=names[0] if names else "", label="class", allow_custom_value=True, visible=bool(names)
                )
                number = gr.Slider(1, MAX_IMAGES, 4, step=1, label="images")
                steps = gr.Number(first.num_inference_steps, precision=0, label="steps")
                scale = gr.Slider(1.0, 10.0, first.guidance_scale, step=0.1, label="guidance")
                with gr.Row():
                    low = gr.Number(first.guidance_interval[0], label="guided from t", step=0.05)
                    high = gr.Number(first.guidance_interval[1], label="to t (1 is noise)", step=0.05)
                seed = gr.Number(0, precision=0, label="seed")
                trajectory = gr.Slider(0, MAX_IMAGES, 8, step=1, label="states on the way")
                with gr.Row():
                    start = gr.Button("Draw", variant="primary", elem_id="draw")
                    end = gr.Button("Stop", elem_id="stop")
                status = gr.Textbox(label="state", interactive=False, elem_id="state")
            shown: list[Any] = []
            for index, side in enumerate(page.sides):
                with gr.Column(scale=2):
                    shown.append(_gallery(side.title, f"images-{index}", 4))
                    shown.append(_gallery("from noise to image", f"trajectory-{index}", 8))
        inputs = [label, number, steps, scale, low, high, seed, trajectory]

        def on_draw(request: gr.Request, *values: Any) -> Iterator[list[Any]]:
            try:
                for words, drawings in page.draw(str(request.session_hash), _request_of(*values)):
                    yield [words, *(gallery for drawing in drawings for gallery in _galleries(drawing))]
            except UserError as error:
                gr.Warning(str(error))
                yield [f"not drawn: {error}", *(gr.skip() for _ in shown)]

        def on_stop(request: gr.Request) -> None:
            page.stop(str(request.session_hash))

        start.click(on_draw, inputs, [status, *shown], concurrency_limit=1, show_progress="minimal", api_name="draw")
        end.click(on_stop, None, None, queue=False, api_name="stop")
    return blocks


def _gallery(label: str, name: str, columns: int) -> Any:
    return gr.Gallery(
        label=label,
        elem_id=name,
        columns=columns,
        height="auto",
        object_fit="contain",
        format="png",
        interactive=False,
    )


def _galleries(drawing: Drawing | None) -> list[Any]:
    """What the two galleries of one side show; images stay until others are there."""
    if drawing is None:
        return [gr.skip(), gr.skip()]
    images = gr.skip() if drawing.images is None else [_enlarged(image) for image in drawing.images]
    return [images, [_enlarged(image) for image in drawing.trajectory]]


def _enlarged(image: Image.Image) -> Image.Image:
    """Small images in whole multiples of their size, so that a browser does not blur them."""
    factor = max(1, -(-_THUMBNAIL_PX // max(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _request_of(
    label: str | None, number: Any, steps: Any, scale: Any, low: Any, high: Any, seed: Any, trajectory: Any
) -> DrawingRequest:
    """What the fields of the page say.

    Raises:
        UserError: a field is empty or holds no number.
    """
    fields = {"number": number, "steps": steps, "seed": seed, "states on the way": trajectory}
    fields |= {"guidance": scale, "guided from t": low, "to t": high}
    for name, value in fields.items():
        if not isinstance(value, int | float):
            raise UserError(f"{name} is empty; give a number")
    return DrawingRequest(
        str(label or ""), int(number), int(steps), float(scale), (float(low), float(high)), int(seed), int(trajectory)
    )

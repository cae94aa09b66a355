"""The page itself, made with gradio; imported only where the page is served."""

from __future__ import annotations

import html
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from repagen.app.drawing import MAX_IMAGES, Drawing, DrawingRequest, draw, numbered_images
from repagen.errors import UserError
from repagen.pipelines.numbered_images import NumberedImages
from repagen.pipelines.png import save_png

STYLE = """
.pictures div {display: flex; flex-wrap: wrap; gap: 6px}
.pictures img {min-width: 112px; max-width: 100%; image-rendering: pixelated}
.on-the-way img {min-width: 0; width: 72px}
"""
"""Pictures of few pixels are enlarged without a blur."""


@dataclass(frozen=True)
class Side:
    """One model on the page.

    Attributes:
        title: stands above its images.
        pipe: a `ClassToImagePipeline` or `TextToImagePipeline`.
        origin: facts of all its images, for their metadata.
    """

    title: str
    pipe: Any
    origin: Mapping[str, Any]


@dataclass(frozen=True)
class Update:
    """What changes on the page: words, and by a side's number its images and the states on the way, as HTML.

    At the end of a drawing also the files of all its images, for programs that draw through the page.
    """

    words: str
    images: Mapping[int, str]
    trajectories: Mapping[int, str]
    files: Sequence[Path] = ()


class Page:
    """What happens on the page; gradio lets one visitor draw at a time.

    Args:
        sides: one model, or two that draw the same request one after the other.
        folder: where the pictures are written that the page shows.

    Attributes:
        takes_prompts: the models draw prompts, not classes.

    Raises:
        UserError: one model draws prompts and the other does not.
    """

    def __init__(self, sides: Sequence[Side], folder: Path) -> None:
        asked = {bool(side.pipe.transformer.takes_text): side.title for side in sides}
        if len(asked) > 1:
            raise UserError(f"{asked[True]} draws prompts and {asked[False]} does not; open them on a page each")
        self.takes_prompts = True in asked
        self.sides = list(sides)
        self.folder = folder
        self._numbers = itertools.count()
        self._stops: dict[str, threading.Event] = {}  # of visitors that have drawn

    def class_names(self) -> list[str]:
        """Names of the classes of all models, ids where they have no names; empty if none has classes."""
        names: dict[str, None] = {}
        for side in self.sides:
            id2label = side.pipe.config.get("id2label") or {}
            classes = range(side.pipe.transformer.config.num_classes)
            names |= {id2label.get(str(label), str(label)): None for label in classes}
        return list(names)

    def draw(self, visitor: str, request: DrawingRequest) -> Iterator[Update]:
        """Draw a request with every model that can and yield what changes on the page; other sides are emptied.

        Raises:
            UserError: no model can draw it.
        """
        stop = self._stops[visitor] = threading.Event()
        sides, refused = self._accepting(request)
        note = "".join(f"\n{self.sides[number].title}: {error}, not drawn" for number, error in refused.items())
        files: list[Path] = []
        if refused:
            yield Update(note.strip(), dict.fromkeys(refused, ""), dict.fromkeys(refused, ""))
        for number, numbered in sides.items():
            shown: list[str] = []
            finished = False
            facts = {**numbered.facts(0), "kind": "state"}
            for drawing in draw(numbered, request.trajectory_images, stop):
                fresh = drawing.trajectory[len(shown) :]
                states = [self._write(picture, {**facts, "step": drawing.step}, "on the way") for picture in fresh]
                shown += [_as_html(path, "on the way") for path in states]
                paths = self._write_images(numbered, drawing)
                images = [_as_html(path, numbered.describe(index)) for index, path in enumerate(paths)]
                files += paths
                finished = bool(images)
                yield Update(
                    f"{self.sides[number].title}: step {drawing.step} of {drawing.num_steps}{note}",
                    {number: "".join(images)} if images else {},
                    {number: "".join(shown)} if fresh else {},
                )
            if not finished:
                yield Update(f"stopped{note}", {}, {})
                return
        yield Update(f"done{note}", {}, {}, files)

    def _accepting(self, request: DrawingRequest) -> tuple[dict[int, NumberedImages], dict[int, UserError]]:
        """The images of the sides that can draw a request, and why the others cannot; raises where none can."""
        accepted: dict[int, NumberedImages] = {}
        refused: dict[int, UserError] = {}
        for number, side in enumerate(self.sides):
            try:
                accepted[number] = numbered_images(side.pipe, side.origin, request)
            except UserError as error:
                refused[number] = error
        if not accepted:
            raise refused[0]
        return accepted, refused

    def stop(self, visitor: str) -> None:
        """Let a visitor's drawing end with its running step."""
        if visitor in self._stops:
            self._stops[visitor].set()

    def _write_images(self, numbered: NumberedImages, drawing: Drawing) -> list[Path]:
        return [
            self._write(picture, numbered.facts(index), numbered.describe(index))
            for index, picture in enumerate(drawing.images or ())
        ]

    def _write(self, picture: Any, facts: Mapping[str, Any], description: str) -> Path:
        path = self.folder / f"{next(self._numbers):08d}.png"  # a name of its own: browsers keep what they have seen
        save_png(picture, path, facts, description)
        return path


def _as_html(path: Path, description: str) -> str:
    """A picture with a link to its file around it."""
    address = f"gradio_api/file={path}"
    return f'<a href="{address}" target="_blank"><img src="{address}" title="{html.escape(description)}"></a>'


def build_page(page: Page) -> gr.Blocks:
    """Lay the page out; nothing on it is fetched from elsewhere."""
    gr.set_static_paths([page.folder])
    with gr.Blocks(title="repagen", analytics_enabled=False, fill_width=True) as blocks:
        with gr.Row():
            with gr.Column(scale=1, min_width=240):
                inputs = _settings(page)
                with gr.Row():
                    start = gr.Button("Draw", variant="primary", elem_id="draw", min_width=80)
                    end = gr.Button("Stop", elem_id="stop", min_width=80)
                status = gr.Textbox(label="state", interactive=False, elem_id="state", lines=2)
            files = gr.File(file_count="multiple", visible=False)  # what programs get; the page shows HTML
            pictures: list[gr.HTML] = []
            for number, side in enumerate(page.sides):
                with gr.Column(scale=3):
                    gr.Markdown(f"**{side.title}**")
                    pictures.append(gr.HTML(elem_id=f"images-{number}", elem_classes="pictures"))
                    gr.Markdown("the first one on its way from noise")
                    pictures.append(gr.HTML(elem_id=f"trajectory-{number}", elem_classes="pictures on-the-way"))

        def on_draw(request: gr.Request, *values: Any) -> Iterator[list[Any]]:
            try:
                for update in page.draw(str(request.session_hash), _request_of(page.takes_prompts, *values)):
                    drawn = [str(path) for path in update.files] or gr.skip()
                    yield [update.words, drawn, *_pictures_of(update, len(page.sides))]
            except UserError as error:
                _warn(error)
                yield [f"not drawn: {error}", None, *(gr.skip() for _ in pictures)]

        def on_stop(request: gr.Request) -> None:
            page.stop(str(request.session_hash))

        start.click(
            on_draw,
            inputs,
            [status, files, *pictures],
            concurrency_limit=1,
            show_progress="minimal",  # the place in the queue, and the time
            show_progress_on=status,
            api_name="draw",
        )
        end.click(on_stop, None, None, queue=False, api_name="stop")
    return blocks


def _warn(error: UserError) -> None:
    gr.Warning(html.escape(str(error)))  # gradio renders it as HTML


def _subject_fields(page: Page) -> list[Any]:
    """What is to be drawn: a prompt and a negative one, or a class."""
    if page.takes_prompts:
        return [
            gr.Textbox(label="prompt", lines=3, elem_id="prompt"),
            gr.Textbox(label="negative prompt", lines=1, elem_id="negative-prompt"),
        ]
    names = page.class_names()
    return [
        gr.Dropdown(
            names,
            value=names[0] if names else "",
            label="class",
            allow_custom_value=True,
            visible=bool(names),
            elem_id="class",
        )
    ]


def _settings(page: Page) -> list[Any]:
    """The fields in the order of `_request_of`, filled with what the first pipeline does by itself."""
    defaults = page.sides[0].pipe.sampling_options({})
    low, high = defaults.guidance_interval
    scale = defaults.guidance_scale
    return [
        *_subject_fields(page),
        gr.Slider(1, MAX_IMAGES, 4, step=1, label="images"),
        gr.Number(defaults.num_inference_steps, precision=0, label="steps", elem_id="steps"),
        gr.Slider(min(1.0, scale), max(10.0, scale), scale, step=0.1, label="guidance"),
        gr.Number(low, label="guided from t (0 is data)", step=0.05),
        gr.Number(high, label="guided to t (1 is noise)", step=0.05),
        gr.Number(0, precision=0, label="seed", elem_id="seed"),
        gr.Slider(0, MAX_IMAGES, 8, step=1, label="states on the way"),
    ]


def _pictures_of(update: Update, num_sides: int) -> Iterator[Any]:
    """New contents of the fields with pictures, two a side; the others keep theirs."""
    for number in range(num_sides):
        yield update.images.get(number, gr.skip())
        yield update.trajectories.get(number, gr.skip())


def _request_of(takes_prompts: bool, *values: Any) -> DrawingRequest:
    """What the fields of the page say.

    Raises:
        UserError: a field is empty or holds no number.
    """
    subject, *rest = values
    negative = rest.pop(0) if takes_prompts else ""
    number, steps, scale, low, high, seed, trajectory = rest
    fields = {"images": number, "steps": steps, "seed": seed, "states on the way": trajectory}
    fields |= {"guidance": scale, "guided from t": low, "guided to t": high}
    for name, value in fields.items():
        if not isinstance(value, int | float):
            raise UserError(f"{name} is empty; give a number")
    return DrawingRequest(
        str(subject or ""), int(number), int(steps), float(scale), (float(low), float(high)), int(seed),
        int(trajectory), str(negative or ""),
    )  # fmt: skip

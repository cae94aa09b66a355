from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
import torch
from drawing_parts import ORIGIN, REQUEST

from repagen.app.drawing import Drawing, DrawingRequest, draw, numbered_images
from repagen.errors import UserError
from repagen.randomness import generator_for


def drawings(pipe: Any, request: DrawingRequest = REQUEST, stop: threading.Event | None = None) -> list[Drawing]:
    numbered = numbered_images(pipe, ORIGIN, request)
    return list(draw(numbered, request.trajectory_images, stop or threading.Event()))


def test_every_step_is_shown_and_the_images_are_those_of_the_pipeline(pipe: Any) -> None:
    seen = drawings(pipe)
    assert [drawing.step for drawing in seen] == [1, 2, 3, 4, 5, 5]
    assert [len(drawing.trajectory) for drawing in seen] == [0, 1, 1, 2, 3, 3]
    generators = [generator_for(3, "sample", index) for index in range(2)]
    expected = pipe([0, 0], generator=generators, num_inference_steps=5, guidance_scale=1.5).images
    assert [drawing.images is None for drawing in seen] == [True] * 5 + [False]
    assert [image.tobytes() for image in seen[-1].images or ()] == [image.tobytes() for image in expected]
    assert seen[-1].trajectory[-1].tobytes() == expected[0].tobytes()


def test_without_states_on_the_way_nothing_is_decoded_before_the_end(pipe: Any, monkeypatch: Any) -> None:
    decoded: list[torch.Tensor] = []
    decode = pipe.vae.decode
    monkeypatch.setattr(
        pipe.vae, "decode", lambda latents, **options: decoded.append(latents) or decode(latents, **options)
    )
    drawings(pipe, dataclasses.replace(REQUEST, trajectory_images=0))
    assert [len(latents) for latents in decoded] == [2]


def test_a_stopped_drawing_ends_with_its_step_and_the_next_one_is_whole(pipe: Any) -> None:
    stop = threading.Event()
    numbered = numbered_images(pipe, ORIGIN, dataclasses.replace(REQUEST, num_inference_steps=500))
    seen = []
    for drawing in draw(numbered, 0, stop):
        seen.append(drawing)
        stop.set()
    assert len(seen) < 400 and all(drawing.images is None for drawing in seen)
    assert drawings(pipe)[-1].images is not None


def test_a_drawing_that_nobody_listens_to_ends_its_thread(pipe: Any) -> None:
    before = threading.active_count()
    running = draw(
        numbered_images(pipe, ORIGIN, dataclasses.replace(REQUEST, num_inference_steps=900)), 0, threading.Event()
    )
    next(running)
    assert threading.active_count() == before + 1
    running.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_an_error_of_the_pipeline_arrives(pipe: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(pipe, "decode_latents", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        drawings(pipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subject": "zebra"}, "'zebra', which is no class"),
        ({"subject": "9"}, "has class 9; this model's classes are 0 to 3"),
        ({"number": 0}, "number is 0; give a whole number from 1 to 16"),
        ({"num_inference_steps": 1}, "num_inference_steps is 1; give a whole number from 2 to 1000"),
        ({"seed": -1}, "seed is -1"),
        ({"trajectory_images": 17}, "trajectory_images is 17"),
        ({"guidance_interval": (0.9, 0.1)}, "guidance_interval"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_drawn(pipe: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        numbered_images(pipe, ORIGIN, dataclasses.replace(REQUEST, **changes))


def test_an_unconditional_model_needs_no_class() -> None:
    from tiny_pipelines import tiny_pipeline, tiny_transformer

    unconditional = tiny_pipeline(transformer=tiny_transformer(num_classes=0))
    assert (
        len(drawings(unconditional, dataclasses.replace(REQUEST, subject="", guidance_scale=1.0))[-1].images or ())
        == 2
    )

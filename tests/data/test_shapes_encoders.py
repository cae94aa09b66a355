"""The bundled pair of encoders of shapes."""

from __future__ import annotations

import json

import numpy as np
import torch
import torch.nn.functional as F

from repagen.data import shapes_encoders_path
from repagen.data.shapes import SHAPES, Scene, draw_scene, sample_scene
from repagen.encoders import VisionEncoder

FOLDER = shapes_encoders_path()


def drawn(scenes: list[Scene]) -> torch.Tensor:
    pixels = torch.from_numpy(np.stack([draw_scene(scene) for scene in scenes]))
    return pixels.permute(0, 3, 1, 2).float().div(255)


def test_the_folder_is_small_and_a_siglip() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 2_000_000
    assert json.loads((FOLDER / "config.json").read_text())["model_type"] == "siglip"


def test_the_vision_encoder_knows_shapes_and_where_they_are() -> None:
    """Nearest mean of the tokens of a quadrant, fitted on other scenes."""
    encoder = VisionEncoder.from_pretrained(FOLDER, norm_affine=False)
    found = {}
    for seed in (21, 22):
        scenes = [sample_scene(seed, index, num_objects=1) for index in range(300)]
        output = encoder(drawn(scenes))
        assert output.grid == (4, 4)
        quadrants = output.tokens.unflatten(1, (2, 2, 2, 2)).mean((2, 4))
        places = [(scene.objects[0].row, scene.objects[0].column) for scene in scenes]
        tokens = torch.stack([quadrants[i, row, column] for i, (row, column) in enumerate(places)])
        found[seed] = tokens, torch.tensor([SHAPES.index(scene.objects[0].shape) for scene in scenes])
    tokens, labels = found[21]
    means = torch.stack([tokens[labels == label].mean(0) for label in range(len(SHAPES))])
    guesses = torch.cdist(found[22][0], means).argmin(1)
    assert (guesses == found[22][1]).float().mean() >= 0.8


def test_prompts_find_their_pictures() -> None:
    from transformers import AutoTokenizer, SiglipModel

    model = SiglipModel.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    scenes = [sample_scene(23, index) for index in range(60)]
    texts = [scene.prompts()[0].text for scene in scenes]
    assert tokenizer.unk_token_id not in tokenizer(texts, padding=True, return_tensors="pt").input_ids
    ids = tokenizer(texts, padding="max_length", max_length=24, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        text = model.text_model(input_ids=ids).pooler_output
        image = model.vision_model(pixel_values=(drawn(scenes) - 0.5) / 0.5).pooler_output
    ranks = F.normalize(text, dim=-1) @ F.normalize(image, dim=-1).T
    assert (ranks.argmax(1) == torch.arange(len(scenes))).float().mean() >= 0.8

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torchmetrics.multimodal.clip_score import CLIPScore

from repagen.errors import UserError
from repagen.evaluation.text_to_image.scores import (
    CLIP_CONVENTIONS,
    ScoringModel,
    clip_score,
    open_scoring_model,
    pick_preferences,
    pick_score,
    truncated_prompts,
)

PROMPTS = ["a red cat", "two dogs", "a red cat", "a boat at sea"]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (4, 3, 20, 28), dtype=torch.uint8)


def one_cosine(clip: ScoringModel, image: torch.Tensor, prompt: str) -> float:
    """By the definition: each tower alone, one picture of Pillow's, one text without padding."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    pixels = clip.processor.image_processor(images=picture, return_tensors="pt")["pixel_values"]
    ids = clip.processor.tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        of_image = clip.model.get_image_features(pixel_values=pixels).pooler_output
        of_text = clip.model.get_text_features(input_ids=ids).pooler_output
    return float(F.cosine_similarity(of_image, of_text)[0])


def test_the_clip_score_is_the_cosine_of_both_towers_features(clip: ScoringModel, images: torch.Tensor) -> None:
    found = clip_score(clip.model, clip.processor, images, PROMPTS)
    expected = [one_cosine(clip, image, prompt) for image, prompt in zip(images, PROMPTS, strict=True)]
    assert found.dtype == torch.float32 and found.shape == (4,)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert len({round(value, 3) for value in expected}) == 4, "the model tells nothing apart"


def test_images_of_different_sizes(clip: ScoringModel, images: torch.Tensor) -> None:
    mixed = [images[0], images[1, :, :, :20], images[2, :, :17], images[3]]
    found = clip_score(clip.model, clip.processor, mixed, PROMPTS)
    expected = [one_cosine(clip, image, prompt) for image, prompt in zip(mixed, PROMPTS, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_an_image_three_pixels_wide_is_still_rows_by_columns(clip: ScoringModel) -> None:
    image = torch.randint(0, 256, (3, 40, 3), dtype=torch.uint8)
    [found] = clip_score(clip.model, clip.processor, [image], ["a"]).tolist()
    pixels = clip.processor.image_processor(images=[image], input_data_format="channels_first", return_tensors="pt")
    ids = clip.processor.tokenizer("a", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = clip.model(input_ids=ids, **pixels).logits_per_image / clip.model.logit_scale.exp()
    assert found == pytest.approx(float(expected), abs=1e-6)


class FeaturesAsTensors:
    """What torchmetrics expects of a CLIP model, which transformers 5 no longer returns."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config

    def to(self, device: Any) -> FeaturesAsTensors:
        return self

    def get_image_features(self, *arguments: Any) -> torch.Tensor:
        return self.model.get_image_features(*arguments).pooler_output

    def get_text_features(self, *arguments: Any) -> torch.Tensor:
        return self.model.get_text_features(*arguments).pooler_output


@pytest.mark.parametrize("sign", [1, -1])
def test_the_figure_of_torchmetrics(clip: ScoringModel, images: torch.Tensor, sign: int) -> None:
    """Also where the mean is negative: torchmetrics clamps it, not the single images."""
    cosines = clip_score(clip.model, clip.processor, images, PROMPTS)
    order = cosines.argsort(descending=sign > 0)[:3]
    metric = CLIPScore(model_name_or_path=lambda: (FeaturesAsTensors(clip.model), clip.processor))
    with torch.no_grad():
        metric.update([images[i] for i in order], [PROMPTS[i] for i in order])
    found = CLIP_CONVENTIONS["100*max(cos,0)"](cosines[order])
    assert float(found) == pytest.approx(float(metric.compute()), abs=1e-4)


def test_the_conventions_come_from_the_same_cosines() -> None:
    cosines = torch.tensor([0.5, -0.2, 0.1, -0.3])
    figures = {name: float(reduce(cosines)) for name, reduce in CLIP_CONVENTIONS.items()}
    assert figures == pytest.approx(
        {"cosine": 0.1 / 4, "100*max(cos,0)": 100 * 0.1 / 4, "2.5*max(cos,0)": 2.5 * (0.5 + 0.1) / 4}
    )
    assert float(CLIP_CONVENTIONS["100*max(cos,0)"](-cosines)) == 0


def test_the_pick_score_is_the_models_own_logit(clip: ScoringModel, images: torch.Tensor) -> None:
    found = pick_score(clip.model, clip.processor, images, PROMPTS)
    inputs = clip.processor(text=PROMPTS, images=list(images), padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = clip.model(**inputs).logits_per_image.diagonal()
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_preferences_are_probabilities_over_the_images_of_a_prompt() -> None:
    scores = torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, -1.0]])
    found = pick_preferences(scores)
    assert found[0].tolist() == pytest.approx([1 / 3] * 3)
    weights = np.exp([0.0, 2.0, -1.0])
    assert found[1].tolist() == pytest.approx((weights / weights.sum()).tolist())


def test_what_exceeds_the_models_limit_is_cut_off_and_counted(clip: ScoringModel, images: torch.Tensor) -> None:
    exact, long, longer = "abc" * 6, "abc" * 7, "abc" * 7 + "xyz"  # 18, 21, 24 tokens, and begin and end
    assert truncated_prompts(clip.model, clip.processor, [exact, long, "a", longer]) == [1, 3]
    seen, cut, cut_too = clip_score(clip.model, clip.processor, images[[0, 0, 0]], [exact, long, longer]).tolist()
    assert cut == pytest.approx(cut_too, abs=1e-6)
    assert seen == pytest.approx(one_cosine(clip, images[0], exact), abs=1e-6)


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (torch.zeros(1, 3, 16, 16), ["a"], r"uint8 \(3, H, W\) each, got float32 \(3, 16, 16\)"),
        (torch.zeros(1, 1, 16, 16, dtype=torch.uint8), ["a"], r"got uint8 \(1, 16, 16\)"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), ["a"], "2 images and 1 prompts"),
        (torch.zeros(0, 3, 16, 16, dtype=torch.uint8), [], "0 images and 0 prompts"),
    ],
)
def test_what_is_no_pair_is_refused(
    clip: ScoringModel, images: torch.Tensor, prompts: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        clip_score(clip.model, clip.processor, images, prompts)


# --- opening -------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(clip_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clip_folder, tmp_path / "copied"))


def edit_json(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_the_identity_tells_weights_apart_and_not_folders(clip: ScoringModel, copied: Path, pick_folder: Path) -> None:
    assert open_scoring_model(str(copied)).identity.matches(clip.identity)
    assert open_scoring_model(str(pick_folder)).identity.weights_sha256 != clip.identity.weights_sha256
    assert clip.identity.settings == "size=16x16, CLIPImageProcessor, tokens=20, dtype=float32"


def test_a_model_is_float32_whatever_its_file_holds(copied: Path, images: torch.Tensor) -> None:
    weights = copied / "model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(weights).items()}, weights, {"format": "pt"})
    edit_json(copied / "config.json", dtype="bfloat16")
    opened = open_scoring_model(str(copied))
    assert opened.model.dtype == torch.float32 and not opened.model.training


def test_a_processor_of_another_folder(copied: Path, clip: ScoringModel, clip_folder: Path) -> None:
    for name in ("tokenizer.json", "vocab.json"):
        (copied / name).unlink()
    with pytest.raises(UserError, match=r"no tokenizer \(tokenizer.json, or vocab.json with merges.txt\)"):
        open_scoring_model(str(copied))
    opened = open_scoring_model(str(copied), processor=str(clip_folder))
    assert opened.identity.weights_sha256 == clip.identity.weights_sha256
    assert f"processor={clip_folder}" in opened.identity.settings


def test_a_model_in_the_hub_cache_is_found_by_its_id(
    clip_folder: Path, clip: ScoringModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--clip"
    shutil.copytree(clip_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    opened = open_scoring_model("org/clip")
    assert opened.identity.name == "org/clip" and opened.identity.matches(clip.identity)


def test_what_cannot_be_opened_is_refused_in_one_line(copied: Path, pick_folder: Path) -> None:
    def refused(name: str, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            open_scoring_model(name)
        assert "\n" not in str(caught.value)

    refused("org/absent", "not in the local cache")
    refused("no such thing", "no such folder")
    weights = load_file(copied / "model.safetensors")
    save_file({**weights, "logit_scale": torch.tensor(float("nan"))}, copied / "model.safetensors", {"format": "pt"})
    refused(str(copied), "model.safetensors:logit_scale: not finite")
    save_file({key: weights[key] for key in weights if key != "logit_scale"}, copied / "model.safetensors")
    refused(str(copied), "1 tensors are missing, the first is logit_scale")
    (copied / "processor_config.json").unlink()
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    refused(str(copied), "no image processor")
    edit_json(copied / "config.json", model_type="siglip")
    refused(str(copied), "model_type 'siglip' is no CLIP model")


def test_a_tokenizer_of_another_model_is_refused(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["text_config"]["vocab_size"] = 100
    (copied / "config.json").write_text(json.dumps(config))
    weights = load_file(copied / "model.safetensors")
    key = "text_model.embeddings.token_embedding.weight"
    save_file({**weights, key: weights[key][:100].clone()}, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"the tokenizer has 190 tokens, model .* knows 100"):
        open_scoring_model(str(copied))

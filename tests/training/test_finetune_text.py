"""Fine-tuning of a text-to-image pipeline: all of it, or adapters; with images of prompts it shall not forget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_parts import finetune, finetune_settings, result_bytes, write_images, write_pipeline
from generator_parts import metric_rows
from PIL import Image
from text_parts import text_settings, train_text, write_text_parts

import repagen
from repagen import TextToImagePipeline
from repagen.data import CombinedDataset, DataConfig, open_dataset
from repagen.errors import UserError
from repagen.training.finetune_prior import repeated
from repagen.training.launch import RunStopped
from repagen.training.run import Run

PRIOR = ["prior.prompts=[a blue square, a green circle]", "prior.images_per_prompt=2"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_text_parts(tmp_path_factory.mktemp("parts"))
    trained = train_text(text_settings(folder, folder / "t2i"), folder / "t2i", "max_steps=2")
    (trained / "pipeline").rename(folder / "pipeline")
    write_images(folder / "pictures", [], count=5)
    for path in (folder / "pictures").glob("*.png"):
        path.with_suffix(".txt").write_text("a red ring\n")
    return folder


@pytest.fixture(scope="module")
def finished(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("finished")
    words = {"full": [], "lora": PRIOR}
    return {mode: tuned(parts, folder / mode, mode, *more) for mode, more in words.items()}


def tuned(parts: Path, folder: Path, mode: str, *words: str) -> Path:
    return finetune(finetune_settings(parts / "pipeline", parts / "pictures", mode), folder, *words)


def load(folder: Path) -> Any:
    pipeline: Any = TextToImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, prompt: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompt, generator=generator, output_type="pt", num_inference_steps=2).images


def test_full_releases_a_pipeline_with_the_same_text_encoder(parts: Path, finished: dict[str, Path]) -> None:
    old, new = load(parts / "pipeline"), load(finished["full"] / "pipeline")
    assert new.text_encoder.describe() == old.text_encoder.describe()
    assert new.config.null_prompt == old.config.null_prompt
    assert not torch.equal(old.transformer.proj_out.weight, new.transformer.proj_out.weight)
    facts = json.loads((finished["full"] / "pipeline" / "training.json").read_text())
    assert (facts["program"], facts["mode"], facts["step"]) == ("finetune", "full", 4)
    card = (finished["full"] / "pipeline" / "README.md").read_text()
    assert "repagen.TextToImagePipeline" in card and "pipe('a red ring')" in card


def test_lora_releases_an_adapter_that_the_pipeline_loads(parts: Path, finished: dict[str, Path]) -> None:
    pipeline = load(parts / "pipeline")
    before = draw(pipeline, "a red ring")
    pipeline.load_lora_weights(finished["lora"] / "adapter")
    assert not torch.equal(draw(pipeline, "a red ring"), before)
    pipeline.unload_lora_weights()
    assert torch.equal(draw(pipeline, "a red ring"), before)
    card = (finished["lora"] / "adapter" / "README.md").read_text()
    assert "repagen.TextToImagePipeline.from_pretrained" in card and "pipe('a red ring')" in card


def test_prior_images_are_the_pipelines_own_with_their_prompts(parts: Path, finished: dict[str, Path]) -> None:
    folder = finished["lora"] / "prior"
    written = {path: json.loads(path.with_suffix(".json").read_text())["caption"] for path in folder.rglob("*.png")}
    assert sorted(written.values()) == ["a blue square"] * 2 + ["a green circle"] * 2
    from repagen.randomness import generator_for

    [image] = load(parts / "pipeline")("a green circle", generator=[generator_for(0, "prior", 1, 0)]).images
    drawn = Image.open(folder / "000001" / "000000.png")
    difference = torch.tensor(list(image.tobytes())).int() - torch.tensor(list(drawn.tobytes())).int()
    assert difference.abs().max() <= 1  # other batches round otherwise


@pytest.mark.slow
def test_prior_images_take_the_sizes_of_the_data_in_turn(parts: Path, tmp_path: Path) -> None:
    pipeline = Path(repagen.__file__).parent / "data" / "shapes_pipeline"
    buckets = ["data.buckets=['1:1', '3:2']", "data.bucket_step=8", f"data.index_folder={tmp_path / 'index'}"]
    words = [*PRIOR, *buckets, "prior.num_inference_steps=2", "prior.forward_batch_size=3", "max_steps=1"]
    words += ["sample.num_images=1"]
    run = finetune(finetune_settings(pipeline, parts / "pictures", "lora"), tmp_path, *words)
    sizes = []
    for path in sorted((run / "prior").rglob("*.png")):
        with Image.open(path) as image:
            sizes.append(image.size)
    assert sizes == [(32, 32), (40, 24), (40, 24), (32, 32)]
    assert len(metric_rows(run)) == 1


def test_a_share_of_prior_images_repeats_the_data(parts: Path) -> None:
    data = open_dataset(DataConfig(path=str(parts / "pictures"), image_size=32))
    assert len(repeated((data, []), 15, None)) == 1
    assert len(repeated((data, []), 15, 0.5)) == 3
    assert len(repeated((data, []), 15, 0.9)) == 1
    assert len(CombinedDataset(repeated((data, []), 15, 0.25), [])) == 45


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_continued_run_is_equal_bit_for_bit(
    parts: Path, finished: dict[str, Path], tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = PRIOR if mode == "lora" else []
    log = Run.log

    def log_and_stop(self: Run, step: int, row: Any) -> None:
        log(self, step, row)
        self._stop.requested = step == 3

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log_and_stop)
        with pytest.raises(RunStopped):
            tuned(parts, tmp_path, mode, *words)
    continued = tuned(parts, tmp_path, mode, *words)
    assert metric_rows(continued) == metric_rows(finished[mode])
    assert result_bytes(continued) == result_bytes(finished[mode])


def test_prior_prompts_come_from_a_file(parts: Path, finished: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a blue square\n\n a green circle \n")
    words = [f"prior.prompts={tmp_path / 'prompts.txt'}", PRIOR[1]]
    run = tuned(parts, tmp_path, "lora", *words)
    assert result_bytes(run) == result_bytes(finished["lora"])


WRONG = [
    ("lora", ["data.path={parts}/plain"], "data.captions: 3 of 3 images have no caption"),
    ("lora", ["num_classes=3"], "num_classes: has no effect"),
    ("full", ["labels.keep=all"], "labels.keep: has no effect"),
    ("full", ["prior.images_per_class=2"], "prior.images_per_class: has no effect"),
    ("lora", ["prior.prompts=/no/such.txt"], "prior.prompts: /no/such.txt: cannot be read"),
    ("lora", ["prior.prompts=[x]", "prior.share=1"], "prior.share: "),
    ("lora", ["prior.share=0.5"], "prior.share: 0.5 has no effect"),
]


@pytest.mark.parametrize(("mode", "words", "message"), WRONG, ids=[words[0] for _, words, _ in WRONG])
def test_wrong_settings_are_one_line(parts: Path, tmp_path: Path, mode: str, words: list[str], message: str) -> None:
    write_images(parts / "plain", [])
    with pytest.raises(UserError, match=message) as caught:
        tuned(parts, tmp_path, mode, *(word.format(parts=parts) for word in words))
    assert "\n" not in str(caught.value)


def test_labels_are_refused_and_prompts_of_a_pipeline_with_classes(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^mode: labels trains the rows of new classes, and .* takes prompts"):
        tuned(parts, tmp_path, "labels")
    classes = write_pipeline(tmp_path / "classes")
    images = write_images(tmp_path / "images")
    for word in ("prior.prompts=[a]", "sample.prompts=[a]"):
        with pytest.raises(UserError, match=rf"^{word.partition('=')[0]}: .* takes classes, not prompts"):
            finetune(finetune_settings(classes, images, "full"), tmp_path / "run", word)

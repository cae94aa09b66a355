"""Text-to-image training: the same loop as with classes, told captions by a frozen text encoder."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from generator_parts import TINY, finish, metric_rows, start, training_state, write_settings
from safetensors.torch import load_file
from text_parts import save_tiny, stop_text_after, text_settings, train_text, write_text_parts

from repagen import ClassToImagePipeline, TextToImagePipeline
from repagen.config import load_config, preset_names, read_preset
from repagen.data import DataConfig, open_dataset
from repagen.encoders.text import TextEncoder
from repagen.errors import UserError
from repagen.flow.conditions import ConditionDropout, Conditions
from repagen.randomness import generator_for
from repagen.training.latent_cache import CacheConfig, cache_latents
from repagen.training.latent_identity import open_autoencoder
from repagen.training.text_to_image import train
from repagen.training.text_to_image_config import TextToImageConfig


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def finished(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(parts, tmp_path_factory.mktemp("finished"))


def run(parts: Path, folder: Path, *words: str) -> Path:
    return train_text(text_settings(parts, folder / "run"), folder, *words)


def losses(folder: Path) -> torch.Tensor:
    return torch.tensor([row["loss_flow"] for row in metric_rows(folder)])


def loaded(folder: Path) -> Any:
    pipeline: Any = TextToImagePipeline.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- conditions ----------------------------------------------------------------------------------------------------


def test_dropped_prompts_become_the_null_prompt_and_others_stay() -> None:
    text, mask = torch.randn(500, 3, 2), torch.ones(500, 3, dtype=torch.bool)
    null = Conditions(text=torch.zeros(1, 3, 2), text_mask=torch.zeros(1, 3, dtype=torch.bool))
    generators = [generator_for(0, "flow", position) for position in range(500)]
    told = ConditionDropout(0.3, null)(Conditions(text=text, text_mask=mask), generators)
    assert told.text is not None and told.text_mask is not None and told.labels is None
    dropped = ~told.text_mask.any(1)
    assert 0.2 < dropped.float().mean() < 0.4
    assert torch.equal(told.text[~dropped], text[~dropped]) and not told.text[dropped].any()
    # The draw is the label's: a keyed one a sample, whatever stands beside it.
    labels = Conditions(labels=torch.zeros(500, dtype=torch.long))
    again = [generator_for(0, "flow", position) for position in range(500)]
    assert torch.equal(ConditionDropout.of_classes(7, 0.3)(labels, again).labels == 7, dropped)


# --- what a run leaves ---------------------------------------------------------------------------------------------


def test_the_release_is_a_pipeline_with_the_averaged_weights_and_the_text_encoder(parts: Path, finished: Path) -> None:
    pipeline = loaded(finished)
    shadow = load_file(finished / "checkpoints" / "step-00000004" / "ema.safetensors")
    for name, tensor in pipeline.transformer.state_dict().items():
        assert torch.equal(tensor, shadow[f"shadow.{name}"]), name
    assert pipeline.transformer.config.text_dim == 32 and pipeline.transformer.config.num_classes == 0
    assert pipeline.transformer.config.text_dropout_prob == pytest.approx(0.3)
    assert pipeline.config.null_prompt == "learned"
    own = TextEncoder.from_encoder(parts / "text", max_length=12)
    assert torch.equal(own.encode(["a red ring"]).embeddings, pipeline.text_encoder.encode(["a red ring"]).embeddings)
    images = pipeline(["a red ring", "a blue star"], num_inference_steps=2, guidance_scale=2.0).images
    assert len(images) == 2


def test_prompts_reach_the_network(parts: Path, finished: Path, tmp_path: Path) -> None:
    other = train_text({**text_settings(parts, tmp_path), "seed": 0}, tmp_path, "text.encoder=" + str(parts / "qwen"))
    rows = [metric_rows(folder)[1:] for folder in (finished, other)]  # at the first step all outputs are 0
    assert rows[0] != rows[1]


def test_training_lowers_the_loss(parts: Path, tmp_path: Path) -> None:
    words = ["max_steps=30", "optimizer.learning_rate=3e-3", "checkpoint.every_steps=30", "data.num_images=8"]
    found = losses(run(parts, tmp_path, *words))
    assert found[-10:].mean() < 0.8 * found[:10].mean()


# --- the same numbers however the work is cut ----------------------------------------------------------------------


@pytest.mark.parametrize("first_steps", [1, 3])
def test_a_continued_run_is_equal_bit_for_bit(parts: Path, tmp_path: Path, finished: Path, first_steps: int) -> None:
    stop_text_after(text_settings(parts, tmp_path / "run"), tmp_path, first_steps)
    continued = run(parts, tmp_path)
    assert metric_rows(continued) == metric_rows(finished)
    assert training_state(continued) == training_state(finished)


def test_grids_and_workers_do_not_touch_training(parts: Path, tmp_path: Path, finished: Path) -> None:
    words = ["sample.every_steps=2", "sample.num_images=3", "sample.prompts=[a red ring, a blue star]"]
    busy = run(parts, tmp_path, *words, "num_workers=1")
    assert len(list((busy / "samples").iterdir())) == 2
    assert metric_rows(busy) == metric_rows(finished)
    assert training_state(busy) == training_state(finished)


def test_accumulation_checkpointing_and_a_prompt_cache_change_nothing(
    parts: Path, tmp_path: Path, finished: Path
) -> None:
    cache = f"text.cache={tmp_path / 'prompts'}"
    first = run(parts, tmp_path / "a", "micro_batch_size=2", cache)
    assert torch.allclose(losses(first), losses(finished), atol=1e-5, rtol=1e-5)
    assert any((tmp_path / "prompts").glob("??/*.safetensors"))
    second = run(parts, tmp_path / "b", "gradient_checkpointing=true", cache)
    assert torch.allclose(losses(second), losses(finished), atol=1e-5, rtol=1e-5)


def test_bf16_stays_near_fp32(parts: Path, tmp_path: Path, finished: Path) -> None:
    half = losses(run(parts, tmp_path, "precision=bf16"))
    assert not torch.equal(half, losses(finished)) and torch.allclose(half, losses(finished), rtol=0.1)


def test_cached_latents_bring_their_captions(parts: Path, tmp_path: Path, finished: Path) -> None:
    from repagen.encoders import VisionEncoder

    dataset: Any = open_dataset(DataConfig(kind="shapes", image_size=32, num_images=40))
    encoders = [VisionEncoder.from_pretrained(parts / "encoder")]
    autoencoder = open_autoencoder(str(parts / "rae"))
    shards = cache_latents(
        autoencoder, dataset, tmp_path / "cache", encoders=encoders, config=CacheConfig(16, shard_rows=16)
    )
    assert shards.has_captions and [shards.captions(k) for k in range(40)] == [dataset.captions(k) for k in range(40)]
    cached = run(parts, tmp_path, "data.kind=latents", f"data.path={tmp_path / 'cache'}")
    assert torch.allclose(losses(cached), losses(finished), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_two_processes_equal_one(parts: Path, tmp_path: Path, finished: Path) -> None:
    config = write_settings(text_settings(parts, tmp_path / "two"), tmp_path / "two.yaml")
    code, errors = finish(start(config, processes=2, program="text_to_image"))
    assert code == 0, errors
    assert torch.allclose(losses(tmp_path / "two"), losses(finished), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")  # dynamo
def test_compiled_blocks_change_nothing(parts: Path, tmp_path: Path, finished: Path) -> None:
    compiled = run(parts, tmp_path, "compile=true")
    assert torch.allclose(losses(compiled), losses(finished), atol=1e-5, rtol=1e-5)


# --- the null prompt, stages, other weights to begin with ----------------------------------------------------------


def test_an_empty_null_prompt_is_the_embedding_of_no_words(parts: Path, tmp_path: Path, finished: Path) -> None:
    folder = run(parts, tmp_path, "text.null_prompt=empty", "sampler.guidance_scale=3")
    pipeline = loaded(folder)
    assert pipeline.config.null_prompt == "empty"
    assert pipeline.config.sampling_defaults["guidance_scale"] == 3
    assert metric_rows(folder)[1:] != metric_rows(finished)[1:]


def test_a_second_stage_goes_on_from_the_released_pipeline(parts: Path, finished: Path, tmp_path: Path) -> None:
    words = [f"{key}={finished / 'pipeline'}" for key in ("transformer.pretrained", "autoencoder.path")]
    words += ["autoencoder.subfolder=vae", "transformer.architecture=null"]
    words += ["transformer.prediction=null", "transformer.overrides={}", "text={dropout: 0.3}", "max_steps=1"]
    words += ["optimizer.learning_rate=1e-12", "optimizer.schedule.warmup_steps=0"]
    folder = run(parts, tmp_path, *words, "data.subset=validation")
    second, first = loaded(folder), loaded(finished)
    for name, tensor in first.transformer.state_dict().items():
        assert torch.allclose(tensor, second.transformer.state_dict()[name], atol=1e-6), name
    assert second.text_encoder.describe() == first.text_encoder.describe()
    now, before = (json.loads((at / "pipeline" / "training.json").read_text()) for at in (folder, finished))
    assert now["step"] == 1 and now["started_from"] == before and before["step"] > 1 and "started_from" not in before


def test_class_conditional_weights_can_begin_it(parts: Path, tmp_path: Path) -> None:
    from generator_parts import settings, train_settings

    classes = train_settings(settings(parts, tmp_path / "classes"), tmp_path / "classes", "max_steps=2")
    words = [f"transformer.pretrained={classes / 'pipeline'}", "max_steps=1", "optimizer.learning_rate=1e-12"]
    text: Any = loaded(run(parts, tmp_path / "text", *words, "optimizer.schedule.warmup_steps=0")).transformer
    old: Any = ClassToImagePipeline.from_pretrained(classes / "pipeline").transformer  # type: ignore[attr-defined]
    assert text.takes_text and text.config.num_classes == 0
    x, t = torch.randn(2, 16, 4, 4), torch.tensor([0.3, 0.8])
    null = torch.zeros(2, 12, 32), torch.zeros(2, 12, dtype=torch.bool)
    told = text(x, t, encoder_hidden_states=null[0], encoder_attention_mask=null[1]).sample
    assert torch.allclose(told, old(x, t, class_labels=torch.tensor([10, 10])).sample, atol=1e-4)


# --- evaluation ----------------------------------------------------------------------------------------------------


def test_figures_are_of_captions_of_the_data(parts: Path, tmp_path: Path, finished: Path) -> None:
    encoder = parts / "encoder"
    words = ["evaluation.every_images=16", "evaluation.num_samples=40", f"evaluation.extractor={encoder}"]
    words += ["evaluation.metrics=[fd]", "evaluation.forward_batch_size=20"]
    folder = run(parts, tmp_path, *words)
    row = metric_rows(folder)[-1]
    assert row["evaluation/fd_encoder"] > 0
    assert [{k: v for k, v in row.items() if "evaluation" not in k} for row in metric_rows(folder)] == metric_rows(
        finished
    )


# --- wrong input ---------------------------------------------------------------------------------------------------

WRONG = [
    (["data.kind=digits"], r"^data.kind: digits has no captions; allowed: images with captions"),
    (["text={}"], r"text.encoder: nothing given; allowed"),
    (["text.encoder=/no/such/folder"], r"^text.encoder: "),
    (["text.hidden_layer=[1, 2]"], r"text.hidden_layer: .*a list with one for each encoder"),
    (["text.template=no place"], "text.template: "),
    (["text.dropout=1"], "text.dropout: "),
    (["label_dropout=0.1"], "label_dropout: unknown"),
    (["transformer.architecture=sit", "transformer.overrides={}"], "^transformer.architecture: SiT.* takes no text"),
    (["transformer.overrides.text_dim=3"], "transformer.overrides.text_dim: cannot be set here"),
    (["alignment.class_token={encoder: digits}"], "alignment.class_token: no network takes both"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[words[0] for words, _ in WRONG])
def test_wrong_settings_are_one_line(parts: Path, tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run(parts, tmp_path, *words)
    assert "\n" not in str(caught.value)


def test_a_pretrained_pipeline_of_another_text_encoder_is_refused(parts: Path, finished: Path, tmp_path: Path) -> None:
    words = [f"transformer.pretrained={finished / 'pipeline'}", f"text.encoder={parts / 'qwen'}"]
    with pytest.raises(UserError, match=r"^text.encoder: .* is not the text encoder of .* \(weights \w+ there, \w+ h"):
        run(parts, tmp_path, *words)
    with pytest.raises(UserError, match=r"^transformer.pretrained: .* takes text; go on with it in text-to-image"):
        from generator_parts import settings, train_settings

        train_settings(settings(parts, tmp_path / "c"), tmp_path / "c", words[0], "alignment={}")


def test_the_same_text_encoder_may_lie_elsewhere(parts: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(parts / "text", tmp_path / "elsewhere")
    pretrained = f"transformer.pretrained={finished / 'pipeline'}"
    own = ["transformer.architecture=null", "transformer.size=null", "transformer.overrides={}"]
    # Its tokens are as many as the pipeline reads (12), where nothing else is asked for.
    words = [pretrained, *own, f"text.encoder={tmp_path / 'elsewhere'}", "max_steps=1"]
    second = run(parts, tmp_path, *words, "text.max_length=null")
    assert len(metric_rows(second)) == 1
    assert loaded(second).text_encoder.max_length == 12
    for word, difference in (("max_length=10", "max_length 12 there, 10 here"), ("hidden_layer=0", "hidden_layer -1")):
        with pytest.raises(UserError, match=f"is read in another way \\({difference}"):
            run(parts, tmp_path / "other", *words, f"text.{word}")


def test_a_run_goes_on_after_the_text_encoder_moved(parts: Path, finished: Path, tmp_path: Path) -> None:
    stop_text_after(text_settings(parts, tmp_path / "run"), tmp_path, 2)
    moved = shutil.copytree(parts / "text", tmp_path / "elsewhere")
    continued = run(parts, tmp_path, f"text.encoder={moved}")
    assert training_state(continued) == training_state(finished)
    save_tiny(moved, "t5", seed=1)
    with pytest.raises(UserError, match=r"^text encoder: .* cannot continue with other data or models"):
        run(parts, tmp_path, f"text.encoder={moved}", "max_steps=5")


def test_text_widths_that_differ_are_refused(parts: Path, finished: Path, tmp_path: Path) -> None:
    from text_parts import save_wider

    save_wider(tmp_path / "wide")
    words = [f"transformer.pretrained={finished / 'pipeline' / 'transformer'}", f"text.encoder={tmp_path / 'wide'}"]
    with pytest.raises(UserError, match=r"^text.encoder: gives embeddings of width 48, but .* takes 32"):
        run(parts, tmp_path, *words)


@pytest.mark.parametrize("word", ["text.dropout=0.2", "text.null_prompt=empty", "text.max_length=10"])
def test_changes_of_the_text_are_refused_on_resume(parts: Path, finished: Path, tmp_path: Path, word: str) -> None:
    shutil.copytree(finished, tmp_path / "run")
    config = write_settings(text_settings(parts, tmp_path / "run"), tmp_path / "config.yaml")
    with pytest.raises(UserError, match=word.partition("=")[0]):
        train(load_config(TextToImageConfig, config, [word]))


# --- presets -------------------------------------------------------------------------------------------------------

PRESETS = ["raev2_text_to_image", "raev2_text_to_image_finetune", "shapes_text_to_image"]


def small(name: str, parts: Path, output: Path) -> list[str]:
    """Words that shrink a preset to tiny parts and drawn shapes; everything else stays the recipe's."""
    _, widths = TINY["raev2" if name.startswith("raev2") else "ditdh"]
    values = {
        "output_dir": output,
        "max_steps": 1,
        "global_batch_size": 4,
        "num_workers": 0,
        "device": "cpu",
        "progress_bar": "false",
        "data.kind": "shapes",
        "data.path": "null",
        "data.image_size": 32,
        "data.num_images": 8,
        "autoencoder.path": parts / "rae",
        "text.max_length": 12,
        "sample.num_images": 2,
        "sample.every_steps": 1,
        "sampler.num_inference_steps": 3,
        "text.encoder": parts / "qwen",
        **{f"transformer.overrides.{key}": value for key, value in widths.items()},
    }
    if name == "shapes_text_to_image":
        values |= {"alignment.targets.0.encoder": parts / "encoder"}
    if name.endswith("finetune"):
        values |= {"transformer.pretrained": "null", "transformer.architecture": "raev2", "transformer.size": "XL"}
        values |= {"autoencoder.subfolder": "null"}
    return [f"{key}={value}" for key, value in values.items()]


@pytest.mark.parametrize("name", PRESETS)
def test_one_training_step_of_each_preset(name: str, parts: Path, tmp_path: Path) -> None:
    config = load_config(TextToImageConfig, name, small(name, parts, tmp_path / "run"))
    recipe = config.recipe
    assert all((recipe.title, recipe.paper, recipe.cost, recipe.expected)) and recipe.program == "text_to_image"
    pipeline = train(config)
    assert (pipeline / "model_index.json").is_file()
    assert (tmp_path / "run" / "samples" / "step-00000001.png").is_file()


def test_these_are_all_presets_of_the_program() -> None:
    assert {name for name in preset_names() if read_preset(name)["recipe"]["program"] == "text_to_image"} == {*PRESETS}


# --- images of several sizes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_and_tall(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captioned pictures of four shapes."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate([(40, 40), (60, 40), (40, 60), (80, 45)] * 4):
        Image.new("RGB", size, (number * 16, 80, 255 - number * 16)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}\n")
    return folder


def bucket_words(parts: Path, pictures: Path, index: Path, *words: str) -> list[str]:
    return [
        "data.kind=folder",
        f"data.path={pictures}",
        "data.buckets=['1:1', '3:2', '2:3', '16:9']",
        "data.bucket_step=4",
        f"data.index_folder={index}",
        f"autoencoder.path={parts / 'kl'}",
        "alignment={}",
        "global_batch_size=4",
        "max_steps=5",
        *words,
    ]


def test_sizes_train_in_turns_and_are_sampled(parts: Path, wide_and_tall: Path, tmp_path: Path) -> None:
    words = bucket_words(parts, wide_and_tall, tmp_path / "index")
    whole = run(parts, tmp_path / "whole", *words)
    stop_text_after(text_settings(parts, tmp_path / "cut"), tmp_path / "cut", 3, *words)
    assert metric_rows(run(parts, tmp_path / "cut", *words)) == metric_rows(whole)
    split = run(parts, tmp_path / "split", *words, "micro_batch_size=2")
    assert torch.allclose(losses(split), losses(whole), atol=1e-5, rtol=1e-5)
    pipeline = loaded(whole)
    assert pipeline.scheduler.config.shift == pytest.approx((4 * 8 * 8 / 4096) ** 0.5)  # of the square
    assert pipeline("picture 3", num_inference_steps=2, height=24, width=40).images[0].size == (40, 24)


@pytest.mark.slow
def test_two_processes_take_the_sizes_of_one(parts: Path, wide_and_tall: Path, tmp_path: Path) -> None:
    words = bucket_words(parts, wide_and_tall, tmp_path / "index")
    whole = run(parts, tmp_path / "whole", *words)
    saved = [word for word in (whole / "config.yaml").read_text().splitlines() if not word.startswith("output_dir:")]
    (tmp_path / "two.yaml").write_text("\n".join([*saved, f"output_dir: {tmp_path / 'two'}"]))
    code, errors = finish(start(tmp_path / "two.yaml", processes=2, program="text_to_image"))
    assert code == 0, errors
    assert torch.allclose(losses(tmp_path / "two"), losses(whole), atol=1e-5, rtol=1e-5)


def test_one_square_bucket_changes_nothing(parts: Path, tmp_path: Path, finished: Path) -> None:
    square = run(parts, tmp_path, "data.buckets=['1:1']", "data.bucket_step=8")
    assert metric_rows(square) == metric_rows(finished)
    assert training_state(square) == training_state(finished)


def aligned_words(parts: Path, pictures: Path, index: Path) -> list[str]:
    """Three sizes of representation latents, aligned in every way that fits a text model."""
    target = f"{{encoder: {parts / 'encoder'}, block: 1, projector: conv, projector_dim: 16}}"
    attention = f"{{encoder: {parts / 'encoder'}, layers: [0], blocks: [1]}}"
    own = "dispersive: {block: 1}, self_alignment: {block: 1, teacher_block: 2}"
    words = dict(word.split("=", 1) for word in bucket_words(parts, pictures, index))
    words |= {"data.buckets": "[[32, 32], [24, 40], [40, 24]]", "data.bucket_step": "8"}
    words |= {"autoencoder.path": str(parts / "rae")}
    words |= {"alignment": f"{{targets: [{target}], attention: {attention}, {own}}}"}
    return [f"{key}={value}" for key, value in words.items()]


def test_sizes_of_representation_latents_train_aligned_and_are_sampled(
    parts: Path, wide_and_tall: Path, tmp_path: Path
) -> None:
    words = aligned_words(parts, wide_and_tall, tmp_path / "index")
    whole = run(parts, tmp_path / "whole", *words)
    split = run(parts, tmp_path / "split", *words, "micro_batch_size=2", "alignment.dispersive=null")
    assert {"loss_alignment", "loss_attention", "loss_dispersive", "loss_self_alignment"} <= {*metric_rows(whole)[0]}
    for name in ("loss_flow", "loss_alignment", "loss_attention"):
        first, second = (metric_rows(folder)[0][name] for folder in (whole, split))
        assert first == pytest.approx(second, abs=1e-5)
    pipeline = loaded(whole)
    for height, width in ((32, 32), (24, 40), (40, 24), (64, 32)):
        image = pipeline("picture 3", num_inference_steps=2, height=height, width=width).images[0]
        assert image.size == (width, height)
        edited = pipeline("picture 4", num_inference_steps=2, height=height, width=width, image=image, strength=0.5)
        assert edited.images[0].size == (width, height)


def test_cached_sizes_train_with_cached_targets(
    parts: Path, wide_and_tall: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from repagen.cli import main

    words = dict(word.split("=", 1) for word in aligned_words(parts, wide_and_tall, tmp_path / "index"))
    data = [f"{key}={value}" for key, value in words.items() if key.startswith("data.")]
    cache, rae, encoder = (str(path) for path in (tmp_path / "cache", parts / "rae", parts / "encoder"))
    told = [*data, "data.image_size=32", "data.captions={}", "--autoencoder", rae, "--encoder", encoder]
    monkeypatch.setattr(sys, "argv", ["repagen", "cache", *told, "--output", cache])
    main()
    target = f"alignment={{targets: [{{encoder: {encoder}, block: 1, projector_dim: 16}}]}}"
    given = [target, f"autoencoder.path={rae}", "global_batch_size=4", "max_steps=3"]
    trained = run(parts, tmp_path, "data.kind=latents", f"data.path={cache}", *given)
    assert all(row["loss_alignment"] > 0 for row in metric_rows(trained))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"autoencoder.path": "{parts}/rae"}, "data.buckets: 28x40 px; allowed: multiples of the autoencoder's 8 px"),
        ({"transformer.patch_size": "2"}, "data.buckets: .* no multiple of the 8 that a token"),
        (
            {"alignment": "{{targets: [{{encoder: {parts}/encoder, image_size: 40, block: 1}}]}}"},
            r"data.buckets \(alignment.targets.0.encoder\): 28x40 px; allowed: multiples of the encoder's 32 px",
        ),
    ],
)
def test_sizes_that_something_does_not_take_are_refused(
    parts: Path, wide_and_tall: Path, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    given = dict(word.split("=", 1) for word in bucket_words(parts, wide_and_tall, tmp_path / "index"))
    given |= {key: value.format(parts=parts) for key, value in changes.items()}
    with pytest.raises(UserError, match=message):
        run(parts, tmp_path, *(f"{key}={value}" for key, value in given.items()))

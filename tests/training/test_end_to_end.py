"""REPA-E: which gradient reaches what, the batch norm between the networks, splits, restarts, releases, presets."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from decoder_parts import rows, run_two_processes, words, write_lpips
from folders import folder_bytes
from generator_parts import new_model, write_parts
from PIL import Image
from torch import nn

from repagen import ClassToImagePipeline, UserError, images_to_latents
from repagen.config import load_config, save_config
from repagen.data import open_dataset
from repagen.randomness import generator_for
from repagen.training.checkpoint import CheckpointFolder
from repagen.training.conditioning import ClassConditioning
from repagen.training.end_to_end import build_objective, train
from repagen.training.end_to_end_config import EndToEndConfig
from repagen.training.end_to_end_step import EndToEndStep, LatentNorm, constant
from repagen.training.frozen import FrozenParts
from repagen.training.generator_alignment import build_terms
from repagen.training.run import open_run

WIDTHS = {"hidden_size": 16, "depth": 3, "num_heads": 2}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    folder = write_parts(tmp_path_factory.mktemp("parts"))
    write_lpips(folder)
    return folder


@pytest.fixture
def configured(parts, tmp_path):
    """The published preset with tiny networks; keywords with __ for dots override."""

    def build(**changes) -> EndToEndConfig:
        values = {
            **{f"transformer.overrides.{key}": value for key, value in WIDTHS.items()},
            "output_dir": tmp_path / "run",
            "max_steps": 4,
            "global_batch_size": 8,
            "num_workers": 0,
            "device": "cpu",
            "precision": "fp32",
            "progress_bar": "false",
            "data.kind": "digits",
            "data.path": "null",
            "data.image_size": 32,
            "autoencoder.path": parts / "kl",
            "alignment.targets.0.encoder": parts / "encoder",
            "alignment.targets.0.block": 2,
            "alignment.targets.0.projector_dim": 16,
            "autoencoder_training.lpips.trunk": parts / "tiny_vgg.pth",
            "autoencoder_training.lpips.heads": parts / "tiny_heads.pth",
            "autoencoder_training.adversarial.patch_width": 4,
            "autoencoder_training.adversarial.patch_layers": 2,
            "autoencoder_training.adversarial.norm_samples": 2,
            "optimizer.learning_rate": 0.001,
            "sampler.num_inference_steps": 3,
            "sample.every_steps": 0,
            "ema.decay": 0.5,
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
        return load_config(EndToEndConfig, "repa_e", words(values))

    return build


# --- the norm ------------------------------------------------------------------------------------------------------


def test_norm_is_batch_norm_whatever_the_split(configured):
    """In training mode over the whole batch, in eval mode for a single latent; running statistics included."""
    reference = nn.BatchNorm2d(3, eps=1e-4, momentum=0.1, affine=False)
    with open_run(configured(), "end_to_end") as run:
        norms = [LatentNorm(3), LatentNorm(3)]
        for step in range(4):
            latents = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(step)) * 3 + 1
            expected = reference.train()(latents)
            torch.testing.assert_close(norms[0].of_global_batch([latents], run)[0], expected)
            torch.testing.assert_close(torch.cat(norms[1].of_global_batch(latents.split(2), run)), expected)
    for norm in norms:
        torch.testing.assert_close(norm.running_mean, reference.running_mean)
        torch.testing.assert_close(norm.running_var, reference.running_var)
        torch.testing.assert_close(norm(latents[:1]), reference.eval()(latents[:1]))


def test_norm_begins_with_the_autoencoders_statistics_and_ends_in_its_config(parts):
    from diffusers import AutoencoderKL

    autoencoder = AutoencoderKL.from_pretrained(parts / "kl")
    images = torch.rand(2, 3, 32, 32)
    before = images_to_latents(autoencoder, images, generator=torch.Generator().manual_seed(0))
    norm = LatentNorm(4)
    norm.start_from(autoencoder)
    torch.testing.assert_close(norm.running_var, torch.full((4,), 0.18215**-2))
    norm.store_in(autoencoder)
    after = images_to_latents(autoencoder, images, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(before, after)


# --- gradients -----------------------------------------------------------------------------------------------------


class OneStep:
    """One step of training: both networks as they were, what they saw, the gradients that either optimiser got."""

    def __init__(self, config: EndToEndConfig) -> None:
        with open_run(config, "end_to_end") as run:
            dataset = open_dataset(config.data)
            frozen = FrozenParts.open(config, dataset, run)
            conditioning = ClassConditioning.of_all(dataset.class_names, config.label_dropout)
            objective = build_objective(config, frozen, conditioning)
            step = EndToEndStep(run, config, frozen, conditioning, objective, dataset)
            _, micro_batches = next(run.steps(dataset, 0))
            (self.batch,) = micro_batches
            self.objective, self.autoencoder, self.norm = map(deepcopy, (objective, frozen.autoencoder, step.norm))
            self.discriminator = deepcopy(step.autoencoder_step.discriminator)
            self.perceptual = step.perceptual
            self.targets = frozen.alignment_inputs(self.batch, objective.terms, ["alignment"])["targets"]
            self.seen: dict[str, dict[str, list[torch.Tensor | None]]] = {}
            networks = {"objective": objective, "autoencoder": frozen.autoencoder}

            def record(update: str) -> None:
                self.seen[update] = {
                    name: [None if p.grad is None else p.grad.clone() for p in network.parameters()]
                    for name, network in networks.items()
                }

            step.autoencoder_step.optimizer.register_step_pre_hook(lambda *_: record("autoencoder"))
            step.generator_step.optimizer.register_step_pre_hook(lambda *_: record("generator"))
            self.row = step(0, iter([self.batch]))

    def draws(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noise of the posterior, time, uniform number of the label's dropout, noise of the path."""
        posterior = [torch.randn(4, 8, 8, generator=generator_for(0, "posterior", i)) for i in range(8)]
        generators = [generator_for(0, "flow", i) for i in range(8)]
        t, drop = (torch.stack([torch.rand((), generator=g) for g in generators]) for _ in range(2))
        return torch.stack(posterior), t, drop, torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators])

    def predict(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Prediction and alignment loss of the generator on x, by the formulas."""
        _, t, _, noise = self.draws()
        (alignment,) = self.objective.terms.values()
        mixed = (1 - t).view(-1, 1, 1, 1) * x + t.view(-1, 1, 1, 1) * noise
        with alignment.capture(self.objective.model):
            prediction = self.objective.model(mixed, t, class_labels=labels).sample
        return prediction, alignment.loss(self.targets)


@pytest.fixture
def one(configured) -> OneStep:
    changes = {f"{part}__max_grad_norm": "null" for part in ("optimizer", "autoencoder_training__optimizer")}
    return OneStep(configured(label_dropout=0.5, **changes))


def assert_gradients(ours: list[torch.Tensor | None], expected: tuple[torch.Tensor | None, ...]) -> None:
    for found, plain in zip(ours, expected, strict=True):
        assert (found is None) == (plain is None)
        if found is not None and plain is not None:
            scale = plain.abs().max().item()
            torch.testing.assert_close(found, plain, atol=1e-5 * scale + 1e-7, rtol=1e-3)


def test_the_autoencoder_learns_from_the_alignment_through_a_constant_generator(one):
    """L1 + LPIPS + KL + GAN + 1.5 align, at running statistics and with every label; no velocity loss."""
    assert all(gradient is None for gradient in one.seen["autoencoder"]["objective"])
    images, autoencoder = one.batch["image"], one.autoencoder
    posterior = autoencoder.encode(2 * images - 1).latent_dist
    latents = posterior.mean + posterior.std * one.draws()[0]
    output = autoencoder.decode(latents).sample / 2 + 0.5
    mean, var = (statistic.view(1, -1, 1, 1) for statistic in (one.norm.running_mean, one.norm.running_var))
    _, aligned = one.predict((latents - mean) / (var + 1e-4).sqrt(), one.batch["label"])
    loss = 2.0 * (output - images).abs().mean() + one.perceptual(output, images).mean()
    loss = loss - 0.1 * one.discriminator(output).mean() + 1e-6 * posterior.kl().mean() + 1.5 * aligned
    assert one.row["autoencoder_alignment"] == pytest.approx(aligned.item(), rel=1e-4, abs=1e-6)
    assert one.row["autoencoder_loss"] == pytest.approx(loss.item(), rel=1e-5)
    parameters = list(autoencoder.parameters())
    assert_gradients(one.seen["autoencoder"]["autoencoder"], torch.autograd.grad(loss, parameters, retain_graph=True))
    of_alignment = torch.autograd.grad(aligned, parameters, allow_unused=True)
    names = [name.split(".")[0] for name, _ in autoencoder.named_parameters()]
    reached = {name for name, gradient in zip(names, of_alignment, strict=True) if gradient is not None}
    assert reached == {"encoder", "quant_conv"}


def test_the_generator_learns_on_detached_latents_standardised_by_their_batch(one):
    """Velocity + 0.5 align on the same draw, times and noise; nothing reaches the autoencoder."""
    assert all(gradient is None for gradient in one.seen["generator"]["autoencoder"])
    posterior_noise, _, drop, noise = one.draws()
    with torch.no_grad():
        posterior = one.autoencoder.encode(2 * one.batch["image"] - 1).latent_dist
        x = nn.BatchNorm2d(4, eps=1e-4, affine=False).train()(posterior.mean + posterior.std * posterior_noise)
    assert 0 < (drop < 0.5).sum() < 8
    prediction, aligned = one.predict(x, torch.where(drop < 0.5, 10, one.batch["label"]))
    flow = (prediction - (noise - x)).square().mean()
    assert one.row["loss_flow"] == pytest.approx(flow.item(), rel=1e-5)
    assert one.row["loss_alignment"] == pytest.approx(aligned.item(), rel=1e-4, abs=1e-6)
    parameters = [parameter for parameter in one.objective.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(flow + 0.5 * aligned, parameters)
    ours = [g for g in one.seen["generator"]["objective"] if g is not None]
    assert_gradients(ours, expected)


def test_constant_gives_back_what_was_trained_and_only_that():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight.requires_grad_(False)
    with constant(module):
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert [parameter.requires_grad for parameter in module.parameters()] == [True, True, False, True]


# --- runs ----------------------------------------------------------------------------------------------------------


def test_accumulation_equals_the_large_batch(configured, tmp_path):
    train(configured(output_dir=tmp_path / "whole", max_steps=1))
    train(configured(output_dir=tmp_path / "split", max_steps=1, micro_batch_size=2))
    (whole,), (split,) = (rows(configured(output_dir=tmp_path / name)) for name in ("whole", "split"))
    assert whole.keys() == split.keys() and "autoencoder_discriminator" in whole
    for name in whole:
        assert split[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("change", [{"gradient_checkpointing": "true"}, {"precision": "bf16"}])
def test_memory_and_precision_settings_give_the_same_losses(configured, tmp_path, change):
    plain = configured(output_dir=tmp_path / "plain", max_steps=2)
    changed = configured(output_dir=tmp_path / "changed", max_steps=2, **change)
    train(plain)
    train(changed)
    for one, two in zip(rows(plain), rows(changed), strict=True):
        for name in ("loss_flow", "autoencoder_l1"):
            assert two[name] == pytest.approx(one[name], rel=1e-5 if "precision" not in change else 0.05)


@pytest.mark.slow
def test_two_processes_equal_one(configured, tmp_path):
    """The norm's statistics too, which are those of the batch of all processes."""
    changes = {"autoencoder_training__adversarial__weight": 0, "max_steps": 3}
    train(configured(output_dir=tmp_path / "whole", **changes))
    save_config(configured(output_dir=tmp_path / "split", **changes), tmp_path / "split.yaml")
    run_two_processes("repagen.training.end_to_end", tmp_path / "split.yaml")
    for one, two in zip(*(rows(configured(output_dir=tmp_path / name)) for name in ("whole", "split")), strict=True):
        for name in one:
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), (one["step"], name)
    norms = [
        CheckpointFolder(tmp_path / name / "checkpoints").newest().part("latent_norm") for name in ("whole", "split")
    ]
    torch.testing.assert_close(*norms, atol=1e-5, rtol=1e-4)


def test_a_continued_run_equals_an_uninterrupted_one(configured, tmp_path):
    for name, steps in (("through", (3,)), ("halved", (2, 3))):
        for count in steps:
            train(configured(output_dir=tmp_path / name, max_steps=count))
    assert rows(configured(output_dir=tmp_path / "through")) == rows(configured(output_dir=tmp_path / "halved"))
    for place in ("pipeline", "checkpoints/step-00000003"):
        one, two = (folder_bytes(tmp_path / name / place) for name in ("through", "halved"))
        tensors = [name for name in one if name.endswith("safetensors")]
        assert tensors and all(one[name] == two[name] for name in tensors)


def test_the_release_is_a_pipeline_that_standardises_by_the_running_statistics(configured, tmp_path):
    folder = train(configured(max_steps=2, sample__every_steps=1, sample__num_images=2))
    pipeline = ClassToImagePipeline.from_pretrained(folder)
    norm = CheckpointFolder(tmp_path / "run" / "checkpoints").newest().part("latent_norm")
    torch.testing.assert_close(torch.tensor(pipeline.vae.config.latents_mean), norm["running_mean"])
    torch.testing.assert_close(torch.tensor(pipeline.vae.config.latents_std), norm["running_var"].sqrt())
    assert pipeline.vae.config.scaling_factor == 1.0
    state = CheckpointFolder(tmp_path / "run" / "checkpoints").newest().part("autoencoder")
    assert all(torch.equal(value, state[name]) for name, value in pipeline.vae.state_dict().items())
    images = pipeline(class_labels=[3], num_inference_steps=3, output_type="pt").images
    assert images.shape == (1, 3, 32, 32)
    assert (tmp_path / "run" / "samples" / "step-00000002.png").is_file()


# --- presets and mistakes ------------------------------------------------------------------------------------------


def test_the_published_sizes_and_weights():
    config = load_config(EndToEndConfig, "repa_e", ["data.path=unused"])
    with torch.device("meta"):
        model = new_model(config, (4, 32, 32), 1000)
        terms = build_terms(config.alignment, model, [768])
    projector = sum(p.numel() for p in terms["alignment"].parameters())
    parameters = sum(p.numel() for p in model.parameters()) + model.pos_embed.numel() + projector
    assert parameters == 683_242_512
    part = config.autoencoder_training
    weights = [part.l1_weight, part.lpips.weight, part.kl_weight, part.adversarial.weight, part.alignment_weight]
    assert weights == [2.0, 1.0, 1e-6, 0.1, 1.5] and config.alignment.schedule.weight == 0.5
    rates = [o.learning_rate for o in (config.optimizer, part.optimizer, part.adversarial.optimizer)]
    assert rates == [1e-4] * 3 and not part.adversarial.adaptive
    assert config.max_steps * config.global_batch_size == pytest.approx(80 * 1_281_167, rel=0.01)


def test_one_step_of_the_digits_preset(parts, tmp_path):
    values = {
        **{f"transformer.overrides.{key}": value for key, value in WIDTHS.items()},
        "output_dir": tmp_path / "run",
        "max_steps": 1,
        "global_batch_size": 4,
        "progress_bar": "false",
        "autoencoder.path": parts / "kl",
        "sampler.num_inference_steps": 3,
    }
    config = load_config(EndToEndConfig, "digits_repa_e", words(values))
    train(config)
    assert rows(config)[0]["autoencoder_psnr"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alignment__targets": "[]"}, r"alignment\.targets: end-to-end training needs one"),
        ({"alignment__dispersive": "{}"}, r"alignment\.dispersive"),
        ({"alignment__schedule": "{kind: cutoff, end_step: 5}"}, r"alignment\.schedule"),
        ({"data__kind": "latents", "data__path": "x"}, r"data\.kind"),
        ({"autoencoder_training__norm_momentum": 0}, r"autoencoder_training\.norm_momentum"),
        ({"autoencoder_training__alignment_weight": -1}, r"autoencoder_training\.alignment_weight"),
    ],
)
def test_wrong_settings_are_named(configured, changes, message):
    with pytest.raises(UserError, match=message):
        configured(**changes)


def test_images_of_several_sizes_are_refused(configured, tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "photos" / name / "0.png")
    photos = {"data__kind": "folder", "data__path": tmp_path / "photos", "data__index_folder": tmp_path / "index"}
    with pytest.raises(UserError, match=r"^data\.buckets: SiTTransformer2DModel takes latents of .* alone"):
        train(configured(**photos, data__buckets="['1:1']"))


def test_other_networks_are_refused(configured, parts, tmp_path):
    with pytest.raises(UserError, match=r"autoencoder\.path.*RepresentationAutoencoder"):
        train(configured(autoencoder__path=parts / "rae", transformer__patch_size=1))
    changes = {"transformer__architecture": "dit", "transformer__prediction": "epsilon", "flow__shift": "auto"}
    with pytest.raises(UserError, match=r"transformer\.architecture.*continuous time"):
        train(configured(output_dir=tmp_path / "dit", **changes))
    changes = {"transformer__architecture": "elt"}
    with pytest.raises(UserError, match=r"^transformer\.architecture: .* not elt; allowed: sit"):
        train(configured(output_dir=tmp_path / "elt", **changes))

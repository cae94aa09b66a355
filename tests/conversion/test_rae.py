"""Official RAE autoencoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from repagen import RepresentationAutoencoder, VisionEncoder, convert_checkpoint
from repagen.conversion.rae import convert_rae
from repagen.errors import UserError

CASES = ["rae_dinov2", "rae_mae", "rae_siglip2"]


def convert(folder: Path, **changes: Any) -> RepresentationAutoencoder:
    arguments = {
        "encoder": folder / "encoder",
        "decoder_config": folder / "decoder_config",
        "statistics": folder / "stat.safetensors",
        **changes,
    }
    return convert_rae(arguments.pop("decoder_path", folder / "weights.safetensors"), **arguments)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_golden(golden: Path, case: str, tmp_path: Path) -> None:
    folder = golden / case
    inputs, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")
    converted = convert_checkpoint(
        "rae",
        folder / "weights.safetensors",
        encoder=folder / "encoder",
        decoder_config=folder / "decoder_config",
        statistics=folder / "stat.safetensors",
    )
    converted.save_pretrained(tmp_path)
    for model in (converted, RepresentationAutoencoder.from_pretrained(tmp_path)):
        outputs = {
            "encoded": model.encode(inputs["image"]).latent,
            "encoded_native": model.encode(inputs["image_native"]).latent,
            "decoded": model.decode(inputs["latent"]).sample,
            "out": model(inputs["image"]).sample,
        }
        assert outputs.keys() == expected.keys()
        for name, output in outputs.items():
            torch.testing.assert_close(output, expected[name], atol=1e-5, rtol=0, msg=name)


@torch.no_grad()
def test_golden_decoder_alone(golden: Path) -> None:
    folder = golden / "rae_decoder"
    inputs, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")
    config = json.loads((folder / "case.json").read_text())["config"]
    model = convert_rae(folder / "weights.safetensors", encoder=None, decoder_config=config)
    latents = inputs["hidden_states"].transpose(1, 2).unflatten(2, (4, 4))
    outputs = {
        "out": model.decoder(inputs["hidden_states"]),
        "out_resized": model.decoder(inputs["hidden_states_6x6"]),
        "image": model.decode(latents).sample,
    }
    assert outputs.keys() == expected.keys()
    for name, output in outputs.items():
        torch.testing.assert_close(output, expected[name], atol=1e-5, rtol=0, msg=name)


def test_training_files_learned_tables_and_partial_statistics(golden: Path, tmp_path: Path) -> None:
    folder = golden / "rae_dinov2"
    decoder = load_file(folder / "weights.safetensors")
    decoder["decoder_pos_embed"] = decoder["decoder_pos_embed"] + 0.1
    whole = {f"decoder.{key}": value for key, value in decoder.items()}
    whole["encoder.encoder.embeddings.cls_token"] = torch.zeros(1, 1, 64)
    broken = {key: value + 1 for key, value in whole.items()}
    torch.save({"step": 3, "epoch": 0, "model": broken, "ema": whole}, tmp_path / "ckpt.pt")
    variance = load_file(folder / "stat.safetensors")["var"]
    torch.save({"mean": None, "var": variance}, tmp_path / "stat.pt")
    model = convert(folder, decoder_path=tmp_path / "ckpt.pt", statistics=tmp_path / "stat.pt")
    assert torch.equal(model.decoder.decoder_pos_embed, decoder["decoder_pos_embed"])
    assert torch.equal(model.latents_mean, torch.zeros(64, 4, 4))
    torch.testing.assert_close(model.latents_std, (variance + 1e-5).sqrt())


def test_official_arguments_are_checked(golden: Path) -> None:
    folder = golden / "rae_dinov2"
    config = json.loads((folder / "case.json").read_text())["config"]
    assert convert(folder, config=config).config.noise_tau == 0.0
    assert convert(folder).config.noise_tau == 0.8
    for change, named in (
        ({"encoder_input_size": 70}, "70 px gives 5 tokens"),
        ({"decoder_patch_size": 8}, "decoder_patch_size: 8"),
        ({"noise": 1}, "unknown key 'noise'"),
        ({"eps": 1e-6}, "eps"),
    ):
        with pytest.raises(UserError, match=named):
            convert(folder, config={**config, **change})


def test_what_does_not_fit_is_named(golden: Path, tmp_path: Path) -> None:
    folder = golden / "rae_dinov2"
    state = load_file(folder / "weights.safetensors")

    def refusal(**edits: torch.Tensor | None) -> str:
        changed = {key: value for key, value in {**state, **edits}.items() if value is not None}
        save_file(changed, tmp_path / "decoder.safetensors")
        with pytest.raises(UserError) as caught:
            convert(folder, decoder_path=tmp_path / "decoder.safetensors")
        return str(caught.value)

    assert "missing, the first is decoder_norm.bias" in refusal(**{"decoder_norm.bias": None})
    assert "decoder_embed.weight is missing" in refusal(**{"decoder_embed.weight": None})
    assert "belong to no RAE decoder, the first is stray" in refusal(stray=torch.ones(1))
    assert "decoder_norm.bias: shape (3,)" in refusal(**{"decoder_norm.bias": torch.ones(3)})
    assert "decoder_norm.bias holds NaN" in refusal(**{"decoder_norm.bias": torch.full((64,), float("nan"))})
    for change, named in (
        ({"statistics": golden / "rae_decoder" / "weights.safetensors"}, "neither 'mean' nor 'var'"),
        ({"statistics": tmp_path / "none.pt"}, "no such file"),
        ({"decoder_config": {"decoder_num_hidden_layers": 3}}, "decoder_num_hidden_layers: 3"),
        ({"decoder_config": {"hidden_act": "relu"}}, "hidden_act"),
        ({"decoder_config": None}, "number of heads of a decoder of width 64"),
        ({"decoder_config": tmp_path / "none"}, "no such file"),
        ({"encoder": golden / "rae_decoder"}, "config.json: no such file"),
    ):
        with pytest.raises(UserError, match=named):
            convert(folder, **change)
    save_file({"mean": torch.zeros(64, 8, 8), "var": torch.ones(64, 8, 8)}, tmp_path / "stat.safetensors")
    with pytest.raises(UserError, match=r"stat\.safetensors: .*mean has shape \(64, 8, 8\)"):
        convert(folder, statistics=tmp_path / "stat.safetensors")


def test_pickled_code_is_refused(golden: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"mean": Payload()}, tmp_path / "stat.pt")
    with pytest.raises(UserError, match="refused"):
        convert(golden / "rae_dinov2", statistics=tmp_path / "stat.pt")
    assert not (tmp_path / "ran").exists()


def test_an_encoder_object_is_shared(golden: Path) -> None:
    encoder = VisionEncoder.from_pretrained(golden / "rae_dinov2" / "encoder", image_size=56)
    assert convert(golden / "rae_dinov2", encoder=encoder).encoder.backbone is encoder.backbone


def test_takes_the_official_constructors_arguments(golden: Path) -> None:
    folder = golden / "rae_dinov2"
    official = json.loads((folder / "case.json").read_text())["config"]
    files = {"encoder": folder / "encoder", "decoder_config": folder / "decoder_config"}
    model = convert_checkpoint("rae", folder / "weights.safetensors", official, **files)
    assert model.config.noise_tau == official["noise_tau"]
    wrong = {**official, "decoder_patch_size": 8}
    with pytest.raises(UserError, match="decoder_patch_size"):
        convert_checkpoint("rae", folder / "weights.safetensors", wrong, **files)

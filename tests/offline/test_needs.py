"""From names to needs: every preset and protocol, what is switched off, and the guide's table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from repagen.config import preset_names
from repagen.errors import UserError
from repagen.evaluation.protocol import protocol_names
from repagen.offline.needs import BLANK, Need
from repagen.offline.recipes import Request

DOCS = Path(__file__).parents[2] / "docs"
VAE = "stabilityai/sd-vae-ft-mse"


def found(name: str, *words: str, **options: Any) -> dict[str, str]:
    """Key => what is needed."""
    return {need.why: need.name for need in Request(name, words, **options).needs()}


@pytest.mark.parametrize("name", [*preset_names(), *protocol_names()])
def test_the_needs_of_everything_shipped_are_known(name: str) -> None:
    for need in Request(name).needs():
        if need.on_hub:
            assert need.name.count("/") == 1
        if need.kind == "path":
            assert need.name == BLANK


def test_every_key_that_names_something_is_read() -> None:
    assert found("sit_xl_reg") == {
        "autoencoder.path": VAE,
        "alignment.targets.0.encoder": "facebook/dinov2-base",
        "alignment.class_token.encoder": "facebook/dinov2-base",
        "evaluation.protocol": "inception",
    }
    assert found("sit_xl_haste")["alignment.attention.encoder"] == "facebook/dinov2-base"
    assert found("repa_e")["autoencoder_training.lpips"] == "lpips-vgg"
    assert found("rae_decoder_vitxl_dinov2b") == {
        "autoencoder.encoder": "facebook/dinov2-with-registers-base",
        "lpips": "lpips-vgg",
        "adversarial.backbone": "facebook/dino-vits8",
    }
    words = ["transformer.pretrained=org/generator", "transformer.revision=v1"]
    assert found("sit_xl_2", *words)["transformer.pretrained"] == "org/generator"
    assert Need("model", "org/generator", "transformer.pretrained", "v1") in Request("sit_xl_2", tuple(words)).needs()
    place = ["autoencoder.path=org/pipeline", "autoencoder.subfolder=vae"]
    (autoencoder,) = (need for need in Request("sit_xl_2", tuple(place)).needs() if need.why == "autoencoder.path")
    assert autoencoder.subfolder == "vae"


def test_what_is_switched_off_or_bundled_is_no_need() -> None:
    assert found("rae_decoder_vitxl_dinov2b", "lpips.weight=0", "adversarial.weight=0").keys() == {
        "autoencoder.encoder"
    }
    assert "adversarial.backbone" not in found("rae_decoder_vitxl_dinov2b", "adversarial.discriminator=patch")
    assert found("digits_decoder") == {}
    assert found("digits_generator") == {"autoencoder.path": BLANK}
    cached = ["data.kind=latents", "data.path=cache"]
    assert "alignment.targets.0.encoder" not in found("sit_xl_repa", *cached)


def test_data_are_needed_only_when_asked_for() -> None:
    words = ["data.kind=datasets", "data.path=org/photos"]
    assert "data.path" not in found("sit_xl_2", *words)
    assert Need("dataset", "org/photos", "data.path") in Request("sit_xl_2", tuple(words), with_data=True).needs()
    assert found("sit_xl_2", with_data=True)["data.path"] == BLANK


def test_evaluation_names_its_extractors_and_statistics() -> None:
    words = ["evaluation.protocol=edm2-dinov2", "evaluation.reference=statistics.npz"]
    needs = Request("sit_xl_2", tuple(words)).needs()
    assert {(need.kind, need.name) for need in needs if need.why.startswith("evaluation")} == {
        ("encoder", "facebook/dinov2-large"), ("file", "inception"), ("path", "statistics.npz"),
    }  # fmt: skip
    assert found("sit_xl_2", "evaluation.extractor=org/encoder")["evaluation.extractor"] == "org/encoder"
    assert "timm/vit_large_patch14_dinov2.lvd142m" in found("raev2").values()
    assert found("adm512")["adm512:reference"] == "VIRTUAL_imagenet512_labeled.npz"


def test_a_file_of_ones_own_need_not_name_its_program(tmp_path: Path) -> None:
    path = tmp_path / "decoder.yaml"
    path.write_text(
        "output_dir: run\nmax_steps: 1\nglobal_batch_size: 1\ndata: {kind: digits}\n"
        "autoencoder: {encoder: org/encoder}\nadversarial: {weight: 0}\n"
    )
    assert found(str(path)) == {"autoencoder.encoder": "org/encoder", "lpips": "lpips-vgg"}


@pytest.mark.parametrize(
    ("name", "words", "options", "message"),
    [
        ("sit_xl_repo", [], {}, r"nothing of that name; did you mean 'sit_xl_repa'\?"),
        ("org/name", ["a=b"], {}, "only a recipe takes key=value"),
        ("sit_xl_2", ["transformer.sise=S"], {}, "did you mean 'size'"),
        ("sit_xl_2", [], {"revision": "v1"}, "--revision: of a Hub id"),
        ("inception", [], {"with_data": True}, "--with-data: does not fit"),
        ("/nowhere/at/all", [], {}, "no such folder"),
        (str(DOCS), [], {}, "a folder on this machine; there is nothing to download"),
    ],
)
def test_wrong_names_and_options_are_refused(name: str, words: list[str], options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Request(name, tuple(words), **options).needs()


def row(name: str) -> str:
    """A line of the guide's table."""
    needs = Request(name).needs()
    fetched = dict.fromkeys(f"`{need.name}`" for need in needs if need.kind != "path")
    yours = [f"`{need.why}`" for need in needs if need.kind == "path"]
    return f"| `{name}` | {', '.join(fetched) or 'nothing'} | {', '.join(yours)} |".replace("|  |", "| |")


def test_the_guides_table_is_what_is_fetched() -> None:
    table = "\n".join(row(name) for name in preset_names())
    assert table in (DOCS / "offline.md").read_text(encoding="utf-8"), f"docs/offline.md needs this table:\n{table}"

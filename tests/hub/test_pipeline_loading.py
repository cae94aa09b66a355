"""Pipelines and their parts by name from a Hub: at one commit, whole, without code, with and without the network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, AutoModel, DiffusionPipeline
from hub_stand_in import COMMIT, StandInHub
from huggingface_hub import constants
from pipelines.tiny_pipelines import tiny_pipeline, tiny_transformer

from repagen import ClassToImagePipeline, RepresentationAutoencoder, SiTTransformer2DModel
from repagen.errors import UserError
from repagen.models.opening import component_place, open_component
from repagen.training.generator_config import TransformerConfig
from repagen.training.generator_model import open_transformer, pinned_pretrained

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
# diffusers' own call, wherever it loads a model from the Hub.
pytestmark = pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument is deprecated:UserWarning")
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, its variant `ema` with other numbers, and what looks like a stored encoder."""
    folder = tmp_path_factory.mktemp("saved")
    variant = tiny_pipeline()
    with torch.no_grad():
        for part in (variant.transformer, variant.vae):
            for parameter in part.parameters():
                parameter.mul_(0.5)
    variant.save_pretrained(folder, variant="ema")
    tiny_pipeline().save_pretrained(folder)
    (folder / "vae" / "encoder.frozen").mkdir()
    shutil.copy(folder / VAE, folder / "vae" / "encoder.frozen" / "model.frozen.safetensors")
    return folder


@pytest.fixture(scope="module")
def newer(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The next commit: another transformer under the same name."""
    folder = tmp_path_factory.mktemp("newer") / "pipeline"
    shutil.copytree(saved, folder)
    tiny_transformer(seed=7).save_pretrained(folder / "transformer")
    return folder


def load(name: Any = "org/tiny", **options: Any) -> ClassToImagePipeline:
    return ClassToImagePipeline.from_pretrained(name, **options)


def refusal(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# --- one commit ------------------------------------------------------------------------------------------------------


def test_the_commit_is_recorded(hub: StandInHub, saved: Path, tmp_path: Path) -> None:
    repository = hub.add("org/tiny", saved, COMMIT)
    repository.refs["v1"] = COMMIT
    local = load(saved)
    for revision in (None, "v1", COMMIT):
        pipe = load(revision=revision)
        assert pipe.hub_commit == COMMIT and pipe.config["_name_or_path"] == "org/tiny"
        assert same(pipe.transformer, local.transformer) and same(pipe.vae, local.vae)
    assert local.hub_commit is None
    pipe.save_pretrained(tmp_path / "again")
    assert COMMIT not in (tmp_path / "again" / "model_index.json").read_text()
    assert load(tmp_path / "again").hub_commit is None


@pytest.mark.parametrize("at", ["(info)", "(tree)", "model_index.json", VAE])
def test_a_load_never_mixes_two_commits(hub: StandInHub, saved: Path, newer: Path, at: str) -> None:
    """Whenever the branch moves, everything is of the commit that it meant at first."""
    repository = hub.add("org/tiny", saved)
    first = repository.refs["main"]
    hub.fault("org/tiny", at, then=lambda: repository.commit(newer), times=1)
    pipe = load()
    assert repository.refs["main"] != first == pipe.hub_commit
    assert same(pipe.transformer, load(saved).transformer)
    assert [request.revision for request in hub.requests].count("main") == 1, "the branch is looked at once"
    assert {request.revision for request in hub.requests} == {"main", first}
    again = load()
    assert again.hub_commit == repository.refs["main"] and same(again.transformer, load(newer).transformer)
    assert same(load(revision=first).transformer, pipe.transformer)


def test_loaded_again_only_the_branch_is_asked(hub: StandInHub, saved: Path) -> None:
    hub.add("org/tiny", saved)
    commit = load().hub_commit
    hub.requests.clear()
    load()
    assert [request.path for request in hub.requests] == ["(info)"]
    load(revision=commit)
    assert len(hub.requests) == 1


def test_only_what_is_loaded_is_fetched(hub: StandInHub, saved: Path) -> None:
    hub.add("org/tiny", saved)
    load()
    fetched = {request.path for request in hub.asked("*.safetensors", method=None)}
    assert fetched == {TRANSFORMER, VAE}, "neither another variant nor the encoder"


def test_fetched_anew(hub: StandInHub, saved: Path) -> None:
    hub.add("org/tiny", saved)
    folder = ClassToImagePipeline.download("org/tiny")
    (folder / VAE).resolve().write_bytes(b"rotten")
    assert VAE in refusal(load)
    assert same(load(force_download=True).vae, load(saved).vae)


# --- what is passed through ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_variant_dtypes_and_components(hub: StandInHub, saved: Path, where: str) -> None:
    hub.add("org/tiny", saved)
    name = saved if where == "folder" else "org/tiny"
    plain = load(saved)
    variant = load(name, variant="ema")
    assert torch.equal(variant.transformer.pos_embed * 0, plain.transformer.pos_embed * 0)
    assert torch.equal(variant.transformer.proj_out.weight, plain.transformer.proj_out.weight * 0.5)
    mapped = load(name, dtype={"transformer": torch.bfloat16, "default": torch.float32})
    assert (mapped.transformer.dtype, mapped.vae.dtype) == (torch.bfloat16, torch.float32)
    assert load(name, device_map="cpu").vae.dtype == torch.float32
    own = tiny_transformer(seed=3)
    assert load(name, transformer=own).transformer is own


def test_a_component_that_is_passed_is_not_fetched(hub: StandInHub, saved: Path) -> None:
    hub.add("org/tiny", saved)
    load(transformer=tiny_transformer(seed=3))
    assert {request.path for request in hub.asked("*.safetensors")} == {VAE}


def test_a_private_pipeline(hub: StandInHub, saved: Path, tmp_path: Path) -> None:
    hub.add("org/tiny", saved, token="hf_secret")
    assert "hf auth login" in refusal(load)
    pipe = load(token="hf_secret", cache_dir=tmp_path / "mine")
    assert same(pipe.vae, load(saved).vae) and (tmp_path / "mine" / "models--org--tiny").is_dir()


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option", [{"custom_pipeline": "org/evil"}, {"trust_remote_code": True}, {"custom_revision": "main"}]
)
def test_no_code_of_a_repository(hub: StandInHub, saved: Path, option: dict[str, Any]) -> None:
    hub.add("org/tiny", saved)
    for name in (saved, "org/tiny"):
        assert f"{next(iter(option))}=" in refusal(load, name, **option)
    assert "runs no code" in refusal(ClassToImagePipeline.download, "org/tiny", **option)
    assert "safetensors alone" in refusal(load, use_safetensors=False)
    assert hub.requests == []


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_what_is_no_pipeline_of_ours(hub: StandInHub, saved: Path, tmp_path: Path, where: str) -> None:
    def tried(change: Callable[[Path], Any]) -> str:
        folder = tmp_path / f"case-{len(hub.repositories)}"
        shutil.copytree(saved, folder)
        change(folder)
        hub.add(f"org/case-{len(hub.repositories)}", folder)
        return refusal(load, folder if where == "folder" else list(hub.repositories)[-1])

    def index(**changes: Any) -> Callable[[Path], Any]:
        def change(folder: Path) -> None:
            path = folder / "model_index.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

        return change

    assert "has no model_index.json" in tried(lambda folder: (folder / "model_index.json").unlink())
    assert "holds a DiTPipeline; a ClassToImagePipeline is needed" in tried(index(_class_name="DiTPipeline"))
    assert "asks for code" in tried(index(_class_name=["pipeline", "ClassToImagePipeline"]))
    assert "model_index.json" in tried(lambda folder: (folder / "model_index.json").write_text("{"))
    assert "lacks scheduler" in tried(lambda folder: shutil.rmtree(folder / "scheduler"))
    assert "lacks vae" in tried(index(vae=[None, None]))
    assert "transformer" in tried(lambda folder: [path.unlink() for path in folder.glob("transformer/*.safetensors")])


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_a_variant_that_is_not_there(hub: StandInHub, saved: Path, where: str) -> None:
    hub.add("org/tiny", saved)
    message = refusal(load, saved if where == "folder" else "org/tiny", variant="fp8")
    assert "variant" in message and "fp8" in message


@pytest.mark.parametrize(
    ("change", "reason"),
    [(1, r"\d+ tensors of the SiTTransformer2DModel are missing, the first is blocks\.\d\."),
     (-1, r"\d+ tensors of the SiTTransformer2DModel are too many, the first is blocks\.\d\.")],
    ids=["deeper", "shallower"],
)  # fmt: skip
def test_a_generator_of_another_depth_than_its_weights_is_refused(
    saved: Path, tmp_path: Path, change: int, reason: str
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "pipe"))
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "depth": config["depth"] + change}))
    with pytest.raises(UserError, match=reason):
        load(folder)
    with pytest.raises(UserError, match=reason):
        AutoModel.from_pretrained(folder, subfolder="transformer")


def test_another_kind_is_refused_before_its_weights_come(hub: StandInHub, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "other")
    index = tmp_path / "other" / "model_index.json"
    index.write_text(index.read_text().replace("ClassToImagePipeline", "DDPMPipeline"))
    hub.add("org/other", tmp_path / "other")
    assert "holds a DDPMPipeline" in refusal(load, "org/other")
    assert not hub.asked("*.safetensors", method=None)


def test_names_that_lead_nowhere(hub: StandInHub, tmp_path: Path) -> None:
    assert "no such model on the Hub" in refusal(load, "org/missing")
    assert "neither a folder on this machine nor a Hub id" in refusal(load, tmp_path / "missing" / "deep")


# --- failures of the Hub ---------------------------------------------------------------------------------------------


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"status": 401}, "hf auth login"),
    ({"status": 403, "code": "GatedRepo"}, "accept its licence"),
    ({"status": 429}, "too many requests"),
    ({"status": 503}, "the Hub answered 503"),
    ({"hang": True}, "no answer within"),
]
FAULTS_OF_FILES: list[tuple[dict[str, Any], str]] = [
    ({"method": "GET", "cut": 10, "resumes": False}, "broke off"),
    ({"method": "GET", "body": b"short"}, "another size"),
]


@pytest.mark.parametrize(
    ("path", "fault", "expected"),
    [
        *((path, *fault) for path in ("(info)", "(tree)", "model_index.json", TRANSFORMER) for fault in FAULTS),
        *((path, *fault) for path in ("model_index.json", TRANSFORMER) for fault in FAULTS_OF_FILES),
    ],
)
def test_a_failure_is_one_line_and_nothing_half_is_used(
    hub: StandInHub,
    saved: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    fault: dict[str, Any],
    expected: str,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    hub.add("org/tiny", saved)
    hub.fault("org/tiny", path, **fault)
    message = refusal(load)
    assert message.startswith("pipeline 'org/tiny'") and expected in message
    assert not list(cache.rglob("*.incomplete"))
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 10)
    hub.faults.clear()
    assert same(load().transformer, load(saved).transformer), "the next call repairs it"


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 503},
        {"status": 429},
        {"status": 429, "headers": {"Retry-After": "3600"}},
        {"hang": True},
    ],
)
def test_a_pipeline_in_the_cache_needs_no_hub(
    hub: StandInHub, saved: Path, fault: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/tiny", saved, COMMIT)
    load()
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    hub.fault("org/tiny", **fault)
    assert load().hub_commit == COMMIT


def test_a_pipeline_in_the_cache_while_connections_are_refused(
    hub: StandInHub, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/tiny", saved, COMMIT)
    load()
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")
    assert load().hub_commit == COMMIT
    assert "out of reach" in refusal(load, "org/never-seen")


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [
        ({"transfomer": torch.bfloat16}, "'transfomer' is no component; allowed are .*transformer"),
        ({"transformer": "blah"}, "dtype='blah'"),
        ("blah", "dtype='blah'"),
        ("int8", "dtype='int8'"),
        (16, "dtype=16"),
    ],
)
def test_a_dtype_that_is_none_is_refused(saved: Path, dtype: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        load(saved, dtype=dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", {"default": "bfloat16"}])
def test_a_dtype_by_its_name(saved: Path, dtype: Any) -> None:
    assert load(saved, dtype=dtype).transformer.dtype == torch.bfloat16


@pytest.mark.parametrize("part", [None, "transformer", "vae"])
def test_a_keyword_that_would_have_no_effect_is_refused(saved: Path, part: str | None) -> None:
    kinds: dict[str | None, Any] = {"transformer": SiTTransformer2DModel, "vae": AutoModel}
    kind, folder = kinds.get(part, ClassToImagePipeline), str(saved / (part or ""))
    said = refusal(kind.from_pretrained, folder, torch_dytpe=torch.float16)
    assert said.endswith("from_pretrained has no keyword 'torch_dytpe'; did you mean 'torch_dtype'?")
    assert refusal(kind.from_pretrained, folder, qqqq=1).endswith(
        "from_pretrained has no keyword 'qqqq'; leave it out"
    )
    kind.from_pretrained(folder, low_cpu_mem_usage=True, proxies=None, offload_state_dict=False, disable_mmap=False)


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "local_files_only"])
def test_offline(hub: StandInHub, saved: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    hub.add("org/tiny", saved, COMMIT)
    load(transformer=tiny_transformer())
    load_here: dict[str, Any] = {"local_files_only": True} if how == "local_files_only" else {}
    if not load_here:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert load(transformer=tiny_transformer(), **load_here).hub_commit == COMMIT
    message = refusal(load, **load_here)
    assert "in the local cache without" in message and TRANSFORMER in message and "hf download org/tiny" in message
    assert "not in the local cache" in refusal(load, "org/never-seen", **load_here)
    assert hub.requests == []


def test_without_the_private_dict_the_whole_commit_comes(
    hub: StandInHub, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.pipelines import pipeline_loading_utils

    monkeypatch.delitem(pipeline_loading_utils.LOADABLE_CLASSES, "repagen")
    hub.add("org/tiny", saved, COMMIT)
    assert load(revision="main").hub_commit == COMMIT
    assert hub.asked("vae/encoder.frozen/*", method=None)


# --- parts by name ---------------------------------------------------------------------------------------------------


def test_parts_of_training_and_conversion_are_of_one_commit(hub: StandInHub, saved: Path, newer: Path) -> None:
    repository = hub.add("org/tiny", saved)
    first = repository.refs["main"]
    hub.fault("org/tiny", "(info)", then=lambda: repository.commit(newer), times=1)
    section = TransformerConfig(pretrained="org/tiny")
    section.revision = pinned_pretrained(section)
    assert section.revision == first
    place = component_place("org/tiny", "transformer", "transformer.pretrained", section.revision)
    assert place == {"subfolder": "transformer", "revision": first}
    assert same(open_transformer("org/tiny", section.revision), load(saved).transformer)
    assert [request.revision for request in hub.requests].count("main") == 1
    assert pinned_pretrained(TransformerConfig()) is None
    assert pinned_pretrained(TransformerConfig(pretrained=str(saved))) is None


def test_one_part_is_opened_at_the_commit_that_was_looked_at(hub: StandInHub, saved: Path, newer: Path) -> None:
    repository = hub.add("org/tiny", saved)
    hub.fault("org/tiny", "(info)", then=lambda: repository.commit(newer), times=1)
    assert same(open_component("org/tiny", "transformer", "--model"), load(saved).transformer)
    hub.add("org/alone", saved / "transformer")
    assert same(open_component("org/alone", "transformer", "--model"), load(saved).transformer)


def test_a_part_that_cannot_be_opened_names_the_option(hub: StandInHub, saved: Path) -> None:
    hub.add("org/tiny", saved)
    assert "--vae: model 'org/missing'" in refusal(open_component, "org/missing", "vae", "--vae")
    assert "no such revision" in refusal(open_component, "org/tiny", "vae", "--vae", "v9")
    hub.fault("org/tiny", VAE, status=403)
    message = refusal(open_component, "org/tiny", "vae", "--vae")
    assert message.startswith("--vae: model 'org/tiny'") and "the Hub answered 403" in message


def test_an_autoencoder_alone_is_of_one_commit(
    hub: StandInHub, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from repagen.encoders import VisionEncoder

    encoder = VisionEncoder.from_pretrained(golden / "rae_mae" / "encoder", image_size=64)
    decoder = dict(
        zip(
            ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
            (16, 1, 2, 32),
            strict=True,
        )
    )
    decoder = {f"decoder_{key}": size for key, size in decoder.items()}
    model = RepresentationAutoencoder.from_encoder(encoder, decoder, image_size=16, decoder_patch_size=4)
    model.save_pretrained(tmp_path / "first", include_encoder=True)
    repository = hub.add("org/vae", tmp_path / "first")
    first = repository.refs["main"]
    hub.fault("org/vae", "(info)", then=lambda: repository.commit(golden), times=1)
    loaded = RepresentationAutoencoder.from_pretrained("org/vae")
    assert {request.revision for request in hub.requests} == {"main", first}
    assert not hub.asked("encoder.frozen/*", method=None)
    assert loaded.encoder.fingerprint() == encoder.fingerprint()
    assert "no such model on the Hub" in refusal(RepresentationAutoencoder.from_pretrained, "org/missing")


def test_diffusers_own_names_still_load(hub: StandInHub, saved: Path, tmp_path: Path) -> None:
    hub.add("org/tiny", saved)
    pipe = DiffusionPipeline.from_pretrained("org/tiny", variant="ema", dtype={"vae": torch.bfloat16})
    assert isinstance(pipe, ClassToImagePipeline) and pipe.hub_commit is None
    assert pipe.vae.dtype == torch.bfloat16
    assert same(pipe.transformer, load(saved, variant="ema").transformer)
    model = AutoModel.from_pretrained("org/tiny", subfolder="transformer", revision="main")
    assert same(model, load(saved).transformer)
    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2).save_pretrained(tmp_path / "kl")
    hub.add("org/kl", tmp_path / "kl")
    assert isinstance(open_component("org/kl", "vae", "--vae"), AutoencoderKL)


USER_PROGRAM = """
import repagen, sys
from repagen.errors import UserError
try:
    print(repagen.ClassToImagePipeline.from_pretrained("org/tiny", revision="v1").hub_commit)
except UserError as error:
    sys.exit(f"refused: {error}")
"""


@pytest.mark.slow
def test_in_a_fresh_process(saved: Path, newer: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "NO_PROXY": "*", "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
    }  # fmt: skip

    def program(**changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", USER_PROGRAM], env={**environment, **changes}, capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip

    with StandInHub() as hub:
        repository = hub.add("org/tiny", newer)
        repository.commit(saved, COMMIT, branch="v1")
        first = program(HF_ENDPOINT=hub.endpoint)
        assert first.stdout.split() == [COMMIT], first.stderr
    here = program(HF_HUB_OFFLINE="1")
    assert here.stdout.split() == [COMMIT], here.stderr
    nothing = program(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty"))
    assert nothing.returncode == 1
    assert "refused: pipeline 'org/tiny' at revision 'v1': no such folder here, and not in the" in nothing.stderr

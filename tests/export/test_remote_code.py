from __future__ import annotations

import argparse
import ast
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import diffusers.utils.dynamic_modules_utils as dynamic_modules
import pytest
import torch
from bare_environment import link_distributions, sample_without_repagen
from diffusers import DiffusionPipeline
from encoders.tiny_text_encoders import save_tiny
from export_cases import CASES, TEXT_CASES
from hub_stand_in import StandInHub
from peft import LoraConfig, get_peft_model_state_dict
from pipelines.tiny_pipelines import tiny_text_pipeline
from safetensors.torch import load_file
from sample_places import draw

from repagen import TextEncoder
from repagen.errors import UserError
from repagen.export.command import add_arguments, run
from repagen.export.modules import LEFT_OUT, READING_PROMPTS
from repagen.export.remote_code import export_remote_code

ROOT = Path(__file__).parents[2]
# What the files of a copy may import when they are loaded, beside Python's own modules and each other.
NEEDED = {"torch", "diffusers", "huggingface_hub", "safetensors", "numpy", "PIL"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, Path]:
    """Case => folder with the saved pipeline (`saved`) and its export (`code`)."""
    folders = {}
    for name, make in CASES.items():
        folders[name] = tmp_path_factory.mktemp(name)
        make().save_pretrained(folders[name] / "saved")
        export_remote_code(folders[name] / "saved", folders[name] / "code")
    return folders


@pytest.fixture
def own_module_cache(tmp_path, monkeypatch) -> Iterator[None]:
    """A folder of its own into which diffusers copies the code of others, forgotten after the test."""
    monkeypatch.setattr(dynamic_modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "diffusers_modules"]:
        del sys.modules[name]


def load(folder: Path, **options):
    return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in ("latents", "pictures"))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def code_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def original_of(text: str) -> Path | None:
    """The file of the library that a copy's header names; None for an entry file."""
    first = text.splitlines()[0].removeprefix("# ").split()[0]
    return ROOT / first if first.startswith("repagen/") else None


def without_imports(source: str, *, copied: bool) -> str:
    """A file's syntax tree without its imports from the library, in the form that they have there."""
    modules = {name for node in ast.walk(ast.parse(source)) for name in copies_imported(node)}

    class Remover(ast.NodeTransformer):
        def visit_ImportFrom(self, node):
            ours = node.level == 1 if copied else (node.module or "").split(".")[0] == "repagen"
            return None if ours else node

        def visit_Assign(self, node):  # name = module_of_the_copy.name
            return None if copied and ast.unparse(node.value).split(".")[0] in modules else node

        def visit_Raise(self, node):
            instead_of_import = copied and "not in this self-contained copy" in ast.unparse(node)
            return None if instead_of_import else node

        def visit_Pass(self, node):
            return None

    return ast.dump(Remover().visit(ast.parse(source)))


def copies_imported(node: ast.AST) -> list[str]:
    """Names of the copy's modules that a statement of one of them imports."""
    if not isinstance(node, ast.ImportFrom) or node.level != 1 or node.module is not None:
        return []
    return [alias.name for alias in node.names]


def test_two_copies_in_one_process_sample_as_the_library(exported, own_module_cache, caplog):
    caplog.set_level(logging.WARNING)
    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        for name in ("sit-rae", "ddt-pixels", "sit-rae"):
            pipe = load(exported[name] / "code")
            assert type(pipe.transformer).__module__.startswith("diffusers_modules.local.repagen_")
            assert same(draw(pipe), draw(CASES[name]()))
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert not caplog.records, "the copy makes noise"


def drawn_by_the_library(folder: Path) -> dict[str, torch.Tensor]:
    return draw(DiffusionPipeline.from_pretrained(folder / "saved"))


@pytest.mark.parametrize("name", TEXT_CASES)
def test_a_copy_reads_prompts_as_the_library(exported, own_module_cache, name):
    pipe = load(exported[name] / "code")
    assert type(pipe.text_encoder).__module__.startswith("diffusers_modules.local.repagen_")
    drawn = draw(pipe)
    assert same(drawn, drawn_by_the_library(exported[name]))
    assert not same(drawn, draw(pipe, prompt=["a blue cube", "ein Würfel"]))


def test_a_text_encoder_by_reference_is_found_by_the_copy(own_module_cache, tmp_path):
    encoder = TextEncoder.from_encoder(save_tiny(tmp_path / "t5", "t5"), max_length=20)
    pipe = tiny_text_pipeline(text_encoder=encoder)
    pipe.save_pretrained(tmp_path / "saved")
    encoder.save_pretrained(tmp_path / "saved/text_encoder", include_encoder=False)
    (tmp_path / "saved/text_encoder/diffusion_pytorch_model.safetensors").unlink()
    shutil.rmtree(tmp_path / "saved/text_encoder/tokenizer.0")
    copy = load(export_remote_code(tmp_path / "saved", tmp_path / "code"))
    assert not list((tmp_path / "code/text_encoder").glob("*.safetensors"))
    assert same(draw(copy), drawn_by_the_library(tmp_path))


def test_components_are_of_the_classes_that_the_copy_compares_with(exported, own_module_cache):
    pipe = load(exported["lightningdit-svg"] / "code")
    module = sys.modules[type(pipe).__module__]
    assert isinstance(pipe.transformer, module.Transformer)
    assert isinstance(pipe.vae, module.Autoencoder)
    assert isinstance(pipe.scheduler, module.Scheduler)


def test_the_copy_keeps_what_a_pipeline_is_saved_with(exported, own_module_cache):
    pipe, saved = load(exported["elt-kl"] / "code"), CASES["elt-kl"]()
    for key in ("id2label", "sampling_defaults"):
        assert pipe.config[key] == saved.config[key]
    with pytest.raises(ValueError, match="near names"):
        pipe(class_labels="golden retriver")


def test_adapters_work_in_the_copy(exported, own_module_cache, tmp_path):
    trained = CASES["ddt-pixels"]()
    trained.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    state = get_peft_model_state_dict(trained.transformer)
    adapter = tmp_path / "adapter"
    trained.save_lora_weights(adapter, state, label_rows={"quokka": torch.randn(16)})
    drawn = []
    for pipe in (load(exported["ddt-pixels"] / "code"), CASES["ddt-pixels"]()):
        pipe.load_lora_weights(adapter)
        assert pipe.config["id2label"]["4"] == "quokka"
        drawn.append(draw(pipe, class_labels=["quokka", 2]))
        pipe.unload_lora_weights()
        drawn.append(draw(pipe))
    assert same(drawn[0], drawn[2]) and same(drawn[1], drawn[3])
    assert not same(drawn[0], drawn[1])


def test_nothing_is_executed_without_trust(exported, own_module_cache):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(exported["sit-rae"] / "code")
    assert not any(name.startswith("diffusers_modules.local.") for name in sys.modules)


def test_a_disabled_machine_refuses_the_copy(exported, own_module_cache, monkeypatch):
    monkeypatch.setattr(dynamic_modules, "DIFFUSERS_DISABLE_REMOTE_CODE", True)
    with pytest.raises(ValueError, match="DIFFUSERS_DISABLE_REMOTE_CODE"):
        load(exported["sit-rae"] / "code")


def test_the_copy_holds_no_encoder_and_says_so(exported, own_module_cache):
    folder = exported["sit-rae"]
    assert (folder / "saved/vae/encoder.frozen").is_dir()
    assert not (folder / "code/vae/encoder.frozen").exists()
    with pytest.raises(ImportError, match="install repagen and load the revision main"):
        load(folder / "code").vae.encode(torch.rand(1, 3, 16, 16))


@pytest.mark.parametrize("name", CASES)
def test_every_file_is_the_librarys_source_with_other_imports(exported, name):
    compared = 0
    for path in code_files(exported[name] / "code"):
        text = path.read_text()
        original = original_of(text)
        assert "SPDX-License-Identifier: Apache-2.0" in text.splitlines()[1]
        if original is None:
            assert len(text.splitlines()) < 70  # the entry files
        elif original.name != "components.py":
            source = original.read_text()
            assert without_imports(text, copied=True) == without_imports(source, copied=False)
            compared += 1
    assert compared > 20


@pytest.mark.parametrize("name", CASES)
def test_the_code_is_complete_and_needs_little(exported, name):
    folder = exported[name] / "code"
    entry = json.loads((folder / "model_index.json").read_text())["_class_name"][0]
    (package,) = folder.glob("repagen_*")
    modules = {path.stem: ast.parse(path.read_text()) for path in package.iterdir()}
    imported = {node.module for node in ast.parse((folder / f"{entry}.py").read_text()).body[1:]}
    assert imported == {f"{package.name}.{stem}" for stem in modules}, "diffusers copies what the entry file imports"
    for stem, tree in modules.items():
        defined = {node.name for node in tree.body if hasattr(node, "name")}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert set(copies_imported(node)) <= modules.keys(), stem
                assert not set(copies_imported(node)) & defined, stem
                continue
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            tops = {name.split(".")[0] for name in names}
            assert "repagen" not in tops
            if node in tree.body:
                assert tops <= NEEDED | sys.stdlib_module_names, f"{stem} imports {tops}"


def test_only_the_parts_that_sample_are_in_the_copy(exported):
    for name, folder in exported.items():
        origins = {str(original_of(path.read_text())) for path in code_files(folder / "code")}
        parts = {Path(origin).relative_to(ROOT / "repagen").parts[0] for origin in origins if origin != "None"}
        assert not parts & {"training", "evaluation", "data", "conversion", "alignment", "cli.py"}
        for module in LEFT_OUT - READING_PROMPTS if name in TEXT_CASES else LEFT_OUT:
            assert not any(origin.endswith(module.replace(".", "/") + ".py") for origin in origins)
    sit = [path.name for path in code_files(exported["sit-rae"] / "code")]
    assert any("transformer_sit" in name for name in sit)
    assert not any("transformer_raev2" in name or "autoencoder_svg" in name for name in sit)


def test_exports_are_equal_and_repositories_share_no_names(exported, tmp_path):
    for name in ("sit-rae", "ditdh-rae"):
        again = export_remote_code(exported[name] / "saved", tmp_path / name)
        assert contents(again) == contents(exported[name] / "code")
    names = [{path for path in contents(folder / "code") if path.suffix == ".py"} for folder in exported.values()]
    assert len(set.union(*names)) == sum(len(some) for some in names)


def test_weights_and_configs_are_as_they_were(exported):
    for folder in exported.values():
        for path in (folder / "code").glob("*/*"):
            if path.suffix in (".json", ".safetensors"):
                assert path.read_bytes() == (folder / "saved" / path.relative_to(folder / "code")).read_bytes()
        assert (folder / "code/transformer/diffusion_pytorch_model.safetensors").is_file()
        old, new = (json.loads((folder / kind / "model_index.json").read_text()) for kind in ("saved", "code"))
        changed = {key for key in old if old[key] != new[key]}
        assert changed == {"_class_name", *(key for key, value in old.items() if "repagen" in str(value))}


def break_weights(folder: Path) -> None:
    weights = folder / "transformer/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))


def change_index(**changes):
    def change(folder: Path) -> None:
        path = folder / "model_index.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_index(_class_name="FluxPipeline"), "holds a FluxPipeline; it must be one of ClassToImagePipeline"),
        (change_index(_class_name=["pipeline", "X"]), "carries its own code already"),
        (change_index(vae=["diffusers", "AsymmetricAutoencoderKL"]), "model_index.json:vae is diffusers.Asymm"),
        (change_index(transformer=["evil", "SiTTransformer2DModel"]), "model_index.json:transformer is evil.SiT"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "model_index.json cannot be read"),
        (lambda folder: shutil.rmtree(folder / "vae"), "vae cannot be read"),
        (break_weights, "transformer has no weights in safetensors"),
    ],
)
def test_what_cannot_be_exported_is_refused(exported, tmp_path, change, message):
    folder = shutil.copytree(exported["sit-rae"] / "saved", tmp_path / "changed")
    change(folder)
    with pytest.raises(UserError, match=message):
        export_remote_code(folder, tmp_path / "code")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed"], "something was left"


def test_a_folder_with_files_is_not_overwritten(exported, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--output: .* is not empty; give a new folder"):
        export_remote_code(exported["sit-rae"] / "saved", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_missing_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="MODEL: no such folder: nowhere"):
        export_remote_code("nowhere", tmp_path / "code")


def test_the_command_says_how_the_folder_gets_to_the_hub(exported, tmp_path):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    output = tmp_path / "an empty folder"
    output.mkdir()
    saved = str(exported["sit-rae"] / "saved")
    text = run(parser.parse_args(["--remote-code", saved, "--output", str(output)]))
    assert f"repagen push '{output}' --to ORG/NAME --revision remote-code" in text
    assert f"{len(code_files(output))} Python files" in text


SVG = ("lightningdit-svg",)  # its residual encoder is a network of torchvision


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "more"),
    [
        ([name for name in CASES if name not in (*SVG, *TEXT_CASES)], ()),
        (SVG, ("torchvision",)),
        (TEXT_CASES, ("transformers",)),
    ],
)
def test_copies_sample_the_same_where_repagen_is_absent(exported, tmp_path, names, more):
    site = tmp_path / "site"
    link_distributions(site, *more)
    jobs = [
        {"place": str(exported[name] / "code"), "options": {}, "output": str(tmp_path / f"{name}.safetensors")}
        for name in names
    ]
    process = sample_without_repagen(jobs, site, tmp_path / "home")
    assert process.returncode == 0, process.stderr[-3000:]
    assert json.loads(process.stdout)["absent"] == [
        name for name in ("transformers", "peft", "timm") if name not in more
    ]
    for name in names:
        assert same(load_file(tmp_path / f"{name}.safetensors"), drawn_by_the_library(exported[name])), name
    noise = [line for line in process.stderr.splitlines() if line.strip() and "components..." not in line]
    assert not noise, noise


# What a user with the library does with the same repository: its branch main needs no trust.
INSTALLED = """
import sys
from pathlib import Path
import repagen
from diffusers import DiffusionPipeline
from repagen.export.remote_code import export_remote_code
from safetensors.torch import save_file
from sample_places import draw

save_file(draw(DiffusionPipeline.from_pretrained("org/tiny")), sys.argv[1])
export_remote_code("org/tiny", Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_a_repository_with_the_branch_serves_both_users(exported, tmp_path):
    site, output = tmp_path / "site", tmp_path / "drawn"
    link_distributions(site)
    output.mkdir()
    with StandInHub() as hub:
        for repo_id, name in (("org/tiny", "ddt-pixels"), ("org/other", "sit-rae")):
            hub.add(repo_id, exported[name] / "saved").commit(exported[name] / "code", branch="remote-code")
        online = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "NO_PROXY": "*", "HF_HUB_DISABLE_XET": "1"}
        jobs = [
            {"place": place, "options": {"revision": "remote-code"}, "output": str(output / f"{index}.safetensors")}
            for index, place in enumerate(("org/tiny", "org/other", "org/tiny"))
        ]
        absent = sample_without_repagen(jobs, site, tmp_path / "home", **online)
        assert absent.returncode == 0, absent.stderr[-3000:]
        environment = {
            **os.environ, **online, "HF_HOME": str(tmp_path / "installed"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
        }  # fmt: skip
        installed = subprocess.run(
            [sys.executable, "-c", INSTALLED, str(output / "main.safetensors"), str(tmp_path / "again")],
            env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert installed.returncode == 0, installed.stderr[-3000:]
    tiny, other = (draw(CASES[name]()) for name in ("ddt-pixels", "sit-rae"))
    for file, expected in {"0": tiny, "1": other, "2": tiny, "main": tiny}.items():
        assert same(load_file(output / f"{file}.safetensors"), expected), file
    assert contents(tmp_path / "again") == contents(exported["ddt-pixels"] / "code")
    assert "from_pretrained" not in absent.stderr and "warn" not in absent.stderr.lower()

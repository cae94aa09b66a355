from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from repagen.config import flatten, load_config, preset_names, save_config
from repagen.errors import UserError
from repagen.training.generator_config import GeneratorConfig

VALID = """
output_dir: out
max_steps: 10
global_batch_size: 8
data: {kind: digits, image_size: 32}
autoencoder: {path: some/folder}
transformer: {architecture: ditdh, size: S}
optimizer: {learning_rate: 1.0e-3}
alignment: {targets: [{encoder: digits, block: 2}]}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(VALID)
    return file


def test_yaml_and_overrides_become_typed_values(path: Path) -> None:
    words = ["optimizer.schedule.kind=linear", "alignment.targets.0.block=4", "flow.shift=2", "ema.decay=9e-1"]
    config = load_config(GeneratorConfig, path, words)
    assert config.optimizer.learning_rate == 1e-3
    assert config.optimizer.schedule.kind == "linear"
    assert config.alignment.targets[0].block == 4
    assert (config.flow.shift, type(config.flow.shift)) == (2.0, float)
    assert config.ema.decay == 0.9
    assert config.micro_batch_size is None


def test_saved_config_reads_back_equal(path: Path, tmp_path: Path) -> None:
    config = load_config(GeneratorConfig, path, ["transformer.overrides={depth: 2, use_rope: false}"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(GeneratorConfig, tmp_path / "saved.yaml") == config


# (override, what the message must name besides the key)
OVERRIDES = [
    ("max_stepss=3", "max_steps"),
    ("learning_rate=3", "optimizer.learning_rate"),
    ("optimizer.lr=3", "learning_rate"),
    ("optimizer.betas=[0.9,0.9]", "beta2"),
    ("max_steps=3.0", "whole number"),
    ("max_steps=true", "whole number"),
    ("max_steps=-1", "at least 1"),
    ("max_steps=null", "whole number"),
    ("max_steps='3'", "whole number"),
    ("max_steps=", "whole number"),
    ("optimizer.learning_rate=fast", "a number"),
    ("optimizer.learning_rate=0", "above 0"),
    ("optimizer.learning_rate=.nan", "finite"),
    ("optimizer.learning_rate=.inf", "finite"),
    ("optimizer.schedule.kind=cosin", "cosine"),
    ("optimizer.schedule.warmup_steps=-1", "at least 0"),
    ("optimizer.schedule=linear", "section"),
    ("optimizer.max_grad_norm=0", "above 0"),
    ("ema.decay=1", "below 1"),
    ("ema.warmup=yes please", "true or false"),
    ("output_dir=5", "quotes"),
    ("output_dir=no", "quotes"),
    ("output_dir=${oc.env:HOME}", "interpolation"),
    ("seed=-1", "at least 0"),
    ("micro_batch_size=3", "divisor of global_batch_size=8"),
    ("precision=fp16", "bf16"),
    ("checkpoint.keep=1", "at least 2"),
    ("checkpoint.every_steps=0", "at least 1"),
    ("data.kind=tar", "folder"),
    ("data.image_size=0", "given"),
    ("data.max_bad_images=-2", "given"),
    ("transformer.size=XXL", "XL"),
    ("transformer.patch_size=0", "at least 1"),
    ("transformer.overrides.dept=2", "depth"),
    ("transformer.overrides.depth=two", "whole number"),
    ("transformer.overrides.depth=-1", "above 0"),
    ("transformer.overrides.num_classes=5", "dataset"),
    ("transformer.overrides={a: {b: '${oc.env:HOME}'}}", "interpolation"),
    ("flow.shift=fast", "auto"),
    ("flow.shift=0", "above 0"),
    ("flow.maximum=1.5", "at most 1"),
    ("flow.std=0", "above 0"),
    ("label_dropout=1", "below 1"),
    ("sampler.preset=rae-oiler", "rae-euler"),
    ("sampler.num_inference_steps=1", "at least 2"),
    ("sample.guidance_scale=0.5", "at least 1"),
    ("alignment.targets.0.block=0", "at least 1"),
    ("alignment.targets.0.loss=mae", "cosine"),
    ("alignment.targets.1.block=2", "no such entry"),
    ("alignment.targets={encoder: digits}", "a list"),
    ("alignment.schedule={kind: cutoff}", "end_step"),
    ("log_with=tensorboard", "a list"),
    ("num_workers=-1", "at least 0"),
]


@pytest.mark.parametrize(("override", "hint"), OVERRIDES, ids=[override for override, _ in OVERRIDES])
def test_wrong_override_is_refused_naming_its_key(path: Path, override: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(GeneratorConfig, path, [override])
    message = str(caught.value)
    assert override.partition("=")[0] in message
    assert hint in message
    assert message.startswith("command line:")
    assert "\n" not in message


# (text added to a valid file, what the message must hold)
FILES = [
    ("max_stepz: 3", "run.yaml:max_stepz"),
    ("max_steps: 11", "duplicate key max_steps"),
    ("seed: ${oc.env:HOME}", "run.yaml:seed"),
    ("seed: ${oc.env", "run.yaml:seed"),
    ("recipe: ???\noutput_dirs: ???", "run.yaml:output_dirs"),
    ("seed: [1", "line"),
    ("seed: !!python/object/apply:os.getcwd []", "constructor"),
    ("log_with: &a [x]\nrecipe: {title: *a}", "aliases"),
    ("log_with: " + "[" * 5000 + "]" * 5000, "nested more than"),
    ("\tseed: 3", "line"),
    ("recipe: {program: encoder}", "run.yaml:recipe.program"),
    ("ema: 3", "run.yaml:ema"),
]


@pytest.mark.parametrize(("text", "hint"), FILES, ids=[text[:30] for text, _ in FILES])
def test_wrong_file_is_refused_naming_file_and_key(path: Path, text: str, hint: str) -> None:
    path.write_text(f"{VALID}\n{text}\n")
    with pytest.raises(UserError, match=r"run\.yaml") as caught:
        load_config(GeneratorConfig, path)
    assert hint in str(caught.value)


@pytest.mark.parametrize("key", ["output_dir", "max_steps", "global_batch_size", "data", "autoencoder"])
def test_missing_key_is_named(path: Path, key: str) -> None:
    path.write_text("\n".join(line for line in VALID.splitlines() if not line.startswith(f"{key}:")))
    with pytest.raises(UserError, match=f"run.yaml:{key}: a value is required"):
        load_config(GeneratorConfig, path)


@pytest.mark.parametrize("words", [["max_steps"], ["=3"], ["a b=3"], ["max_steps=1", "max_steps=2"], ["seed=1\nx: 2"]])
def test_malformed_words_are_refused(path: Path, words: list[str]) -> None:
    with pytest.raises(UserError, match="command line"):
        load_config(GeneratorConfig, path, words)


@pytest.mark.parametrize("content", [b"", b"- 1", b"5", b"\xff\xfe\x00", b"x" * 2_000_000])
def test_what_is_no_configuration_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"run\.yaml"):
        load_config(GeneratorConfig, path)


def test_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(UserError) as caught:
        load_config(GeneratorConfig, "no_such_preset")
    assert all(name in str(caught.value) for name in preset_names())


def test_environment_is_never_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "42")
    with pytest.raises(UserError) as caught:
        load_config(GeneratorConfig, path, ["seed=${oc.decode:${oc.env:SECRET}}"])
    assert "42" not in str(caught.value)


def test_flatten_keeps_empty_containers() -> None:
    assert flatten({"a": {"b": [1, {"c": 2}]}, "d": [], "e": {}}) == {"a.b.0": 1, "a.b.1.c": 2, "d": [], "e": {}}


def test_every_field_of_the_schema_is_documented() -> None:
    undocumented = [
        f"{schema.__name__}.{field.name}"
        for schema in (GeneratorConfig, *GeneratorConfig.__mro__[1:-1])
        for field in dataclasses.fields(schema)
        if field.name in schema.__annotations__ and f"{field.name}" not in (schema.__doc__ or "")
    ]
    assert not undocumented


@dataclasses.dataclass
class Lamp:
    watts: int = 60
    colour: str = "white"


@dataclasses.dataclass
class Room:
    lamp: Lamp = dataclasses.field(default_factory=lambda: Lamp(watts=3, colour="blue"))


def test_a_section_given_in_part_keeps_the_rest_of_its_fields_own_default(tmp_path: Path) -> None:
    file = tmp_path / "room.yaml"
    file.write_text("lamp: {watts: 5}")
    assert load_config(Room, file).lamp == Lamp(watts=5, colour="blue")
    assert load_config(Room, file, ["lamp.colour=red"]).lamp == Lamp(watts=5, colour="red")
    file.write_text("lamp: {wats: 5}")
    with pytest.raises(UserError, match=r"lamp\.wats: unknown key"):
        load_config(Room, file)


def test_the_schedule_of_a_term_keeps_the_terms_published_weight(path: Path) -> None:
    config = load_config(GeneratorConfig, path, ["alignment.self_alignment.schedule={kind: cutoff, end_step: 5}"])
    assert config.alignment.self_alignment is not None
    assert config.alignment.self_alignment.schedule.weight == 0.2

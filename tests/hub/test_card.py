"""The model card as a function of facts: what parses, what is said, what never gets in."""

from __future__ import annotations

import re

import pytest
import yaml
from huggingface_hub import ModelCard

from repagen.hub.card import (
    CardFacts,
    CardKind,
    Figure,
    LicenceFact,
    addressed,
    class_to_ask_for,
    render_card,
    without_local_paths,
)

FIGURE = Figure(
    metric="fid",
    value=3.25,
    protocol="adm256",
    num_samples=50000,
    num_reference=10000,
    extractor="/opt/weights/inception (port; weights 0123456789ab)",
    reference="f" * 64,
    step=7,
    comparable=True,
)


def facts(kind: CardKind = "class_to_image", **changes: object) -> CardFacts:
    values = {
        "kind": kind,
        "class_name": {"autoencoder": "SVGAutoencoder", "transformer": "SiTTransformer2DModel"}.get(
            kind, "ClassToImagePipeline"
        ),
        "summary": "Draws.",
        "num_classes": 3,
        "class_names": ["a|b", "crane, bird", "crane, machine"],
        "figures": [FIGURE],
        "config": {"output": "/home/me/run", "data": {"path": "/mnt/big disk/cats & dogs"}, "lr": 1e-4},
    }
    return CardFacts(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["class_to_image", "autoencoder", "transformer", "adapter"])
def test_every_kind_has_a_card_whose_code_compiles(kind: CardKind) -> None:
    card = ModelCard(addressed(render_card(facts(kind)), "org/name"))
    assert card.data.library_name == "repagen"
    [code] = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    compile(code, "card", "exec")
    assert "import repagen" in code and '"org/name"' in code
    assert "ORG/NAME" not in card.content


def test_figures_stand_in_the_table_and_in_the_model_index_with_all_they_depend_on() -> None:
    card = ModelCard(addressed(render_card(facts(datasets=["org/cats"])), "org/name"))
    [result] = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("fid", 3.25, "org/cats")
    assert result.metric_args["protocol"] == "adm256" and result.metric_args["num_samples"] == 50000
    assert result.metric_args["reference_sha256"] == "f" * 64
    assert card.data.model_name == "org/name" and card.data.datasets == ["org/cats"]
    row = ["fid", "3.25", "adm256", "50000", "10000", ".../inception (port; weights 0123456789ab)", "f" * 16, "7"]
    assert f"| {' | '.join(row)} |" in card.text


def test_a_figure_that_is_not_comparable_says_so() -> None:
    figure = Figure(**{**vars(FIGURE), "comparable": False})
    text = render_card(facts(figures=[figure], remarks=["too few samples"]))
    assert "| fid (not comparable) |" in text and "- too few samples" in text


def test_an_example_is_a_name_that_is_no_other_class_and_else_an_id() -> None:
    names = ["a|b", "crane, bird", "crane, machine", "", "4"]
    assert [class_to_ask_for(names, label) for label in range(5)] == ["a|b", 1, 2, 3, 4]
    assert class_to_ask_for([], 7) == 7
    assert "class_labels=['a|b']" in render_card(facts(example="a|b"))
    assert "pipe().images" in render_card(facts(num_classes=0, class_names=()))


def test_the_recipe_reads_back_without_the_places_it_ran_in() -> None:
    text = render_card(facts())
    [config] = re.findall(r"````yaml\n(.*?)````", text, re.DOTALL)
    assert yaml.safe_load(config) == {"output": ".../run", "data": {"path": ".../cats & dogs"}, "lr": 1e-4}
    assert not [place for place in ("/home", "/mnt", "/opt") if place in text]


def test_unknown_and_closed_licences_are_said() -> None:
    encoder = LicenceFact(part="encoder", name="x", licence="CC-BY-NC-4.0", consequence="no commercial use")
    text = render_card(facts(licences=[encoder]))
    assert "license: unknown" in text and "nobody else has leave to use it" in text
    assert "| encoder | x | CC-BY-NC-4.0 | no commercial use |" in text


def test_adapters_and_fine_tunes_name_their_base() -> None:
    card = ModelCard(render_card(facts("adapter", base_model="org/base", base_revision="abc")))
    assert card.data.base_model == "org/base" and card.data.base_model_relation == "adapter"
    assert 'from_pretrained("org/base", revision="abc")' in card.text
    assert ModelCard(render_card(facts(base_model="org/base"))).data.base_model_relation == "finetune"


def test_the_branch_is_named_in_what_loads() -> None:
    text = addressed(render_card(facts("adapter", base_model="org/base")), "org/name", "v2")
    assert 'load_lora_weights("org/name", revision="v2")' in text and 'from_pretrained("org/base")' in text
    assert "revision" not in addressed(render_card(facts()), "org/name", "main")
    named = 'X.from_pretrained("ORG/NAME", revision="old", trust_remote_code=True)'
    assert addressed(named, "org/name", "v2") == 'X.from_pretrained("org/name", revision="v2", trust_remote_code=True)'


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("/home/me/photos", ".../photos"),
        ("~/photos/cats/", ".../cats"),
        ("data.path=/home/my name/cats", "data.path=.../cats"),
        ("the file /home/me/x.npz, made with /opt/y/z", "the file .../x.npz, made with .../z"),
        ("file:///home/me/photos", ".../photos"),
        ("C:\\Users\\my name\\cats", ".../cats"),
        ("C:\\photos", ".../photos"),
        ("data.path=D:/photos/cats", "data.path=.../cats"),
        ("see file:///C:/me/x.npz, C:\\Users\\me\\y or D:/me/z", "see .../x.npz, .../y or .../z"),
        ("org/name", "org/name"),
        ("https://huggingface.co/org/name", "https://huggingface.co/org/name"),
        ("runs/digits", "runs/digits"),
        ("1/2 and 3/4", "1/2 and 3/4"),
        (3, 3),
    ],
)
def test_paths_of_this_machine_are_cut(given: object, shown: object) -> None:
    assert without_local_paths(given) == shown
    assert without_local_paths({"key": [given]}) == {"key": [shown]}

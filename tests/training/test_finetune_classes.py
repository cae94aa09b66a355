from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from repagen.data import CombinedDataset, SampleDataset
from repagen.errors import UserError
from repagen.training.finetune_classes import new_rows, plan_classes
from repagen.training.finetune_config import FinetuneConfig, LabelsConfig, PriorConfig

NAMES = {"0": "tabby, cat", "1": "dog", "2": "crane", "3": "lifter, crane"}


def config(mode: Any = "full", keep: Any = None, prior: int = 0, **more: Any) -> FinetuneConfig:
    from repagen.data import DataConfig

    labels = LabelsConfig(keep=keep, start_from=more.pop("start_from", {}))
    return FinetuneConfig(
        output_dir="x", max_steps=1, global_batch_size=1, data=DataConfig(path="x"), pipeline="p", mode=mode,
        labels=labels, prior=PriorConfig(images_per_class=prior), **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "data", "kept", "of_data", "names"),
    [
        (config(), ["ant", "bee"], [], [0, 1], ["ant", "bee"]),
        (config(), ["ant", "cat"], [0], [1, 0], ["tabby, cat", "ant"]),
        (config(keep="all"), ["bee", "DOG"], [0, 1, 2, 3], [4, 1], [*NAMES.values(), "bee"]),
        (config(prior=1), ["bee"], [0, 1, 2, 3], [4], [*NAMES.values(), "bee"]),
        (config("lora"), ["bee"], [0, 1, 2, 3], [4], [*NAMES.values(), "bee"]),
        (config(keep=[3, "dog", 3]), ["bee", "cat"], [3, 1, 0], [3, 2], ["lifter, crane", "dog", "tabby, cat", "bee"]),
        # One class is called `crane` in full, the other among its synonyms: the full name counts.
        (config(keep="none"), ["crane"], [2], [0], ["crane"]),
    ],
)
def test_classes_are_matched_by_name(
    given: FinetuneConfig, data: list[str], kept: list[int], of_data: list[int], names: list[str]
) -> None:
    plan = plan_classes(given, 4, NAMES, data)
    assert (plan.kept, plan.of_data, plan.class_names) == (kept, of_data, names)
    assert [plan.class_names[label] for label in plan.new_ids] == plan.new
    assert plan.id2label == {str(label): name for label, name in enumerate(names)}


def test_classes_without_names_keep_their_ids() -> None:
    plan = plan_classes(config("labels"), 3, None, ["bee"])
    assert (plan.class_names, plan.id2label) == (["0", "1", "2", "bee"], {"3": "bee"})


def test_rows_of_new_classes_begin_with_the_mean_or_a_class() -> None:
    table = torch.arange(10.0).reshape(5, 2)
    plan = plan_classes(config(start_from={"bee": "dog"}), 4, NAMES, ["ant", "bee"])
    assert torch.equal(new_rows(table, plan, 4), torch.stack([table[:4].mean(0), table[1]]))


def test_names_with_two_classes_are_refused_and_go_under_another_name() -> None:
    twice = {"0": "a, jay", "1": "b, jay", "2": "crane", "3": "crane"}
    for name, ids in {"Jay": "[0, 1]", "crane": "[2, 3]"}.items():
        with pytest.raises(UserError, match=re.escape(f"data: {name!r} names the pipeline's classes {ids}; rename")):
            plan_classes(config("labels"), 4, twice, [name])
    plan = plan_classes(config("labels", start_from={"crane bird": 2}), 4, twice, ["crane bird"])
    assert (plan.new, plan.sources) == (["crane bird"], {"crane bird": 2})


@pytest.mark.parametrize("names", [["Bird", "bird"], ["CAT", "ant", "cat"]])
def test_names_that_differ_in_case_only_are_refused(names: list[str]) -> None:
    with pytest.raises(UserError, match=f"data: the classes '{names[0]}' and '{names[-1]}' differ in case only"):
        plan_classes(config("labels"), 4, NAMES, names)


def test_classes_of_the_data_that_are_one_of_the_pipeline_are_told(caplog: pytest.LogCaptureFixture) -> None:
    assert plan_classes(config(), 4, NAMES, ["cat", "dog", "tabby"]).of_data == [0, 1, 0]
    assert caplog.messages == ["cat and tabby of the data are one class of the pipeline, 'tabby, cat'"]


@pytest.mark.parametrize(
    ("given", "num_classes", "data", "message"),
    [
        (config(), 4, [], "data.path: x has no classes, but p has 4"),
        (config(), 0, ["ant"], "data.path: x has 1 classes, but p is unconditional"),
        (config(num_classes=4), 4, ["ant"], "num_classes: 4 expected, but 0 classes stay and 1 are new"),
        (config("labels"), 4, ["dog"], "mode: labels trains the rows .* knows all classes of the data; rename them"),
        (config("labels"), 0, [], "mode: labels trains the rows .* is unconditional; take mode=full"),
        (config(prior=1), 4, ["cat", "dog", "crane", "lifter, crane"], "prior.images_per_class: the data has every"),
        (config(prior=1, keep=[]), 4, ["ant"], "prior.images_per_class: no class of the pipeline stays"),
        (config(start_from={"dog": "cat"}), 4, ["dog"], "labels.start_from.dog: no new class of the data"),
    ],
)
def test_what_does_not_fit_is_named(given: FinetuneConfig, num_classes: int, data: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_classes(given, num_classes, NAMES, data)


class Numbers(SampleDataset):
    """Samples whose value says where they are from."""

    def __init__(self, values: list[int], classes: int) -> None:
        self.values, self.class_names = values, [str(k) for k in range(classes)]

    def __len__(self) -> int:
        return len(self.values)

    def load(self, index: int, generator: torch.Generator | None = None) -> dict[str, int]:
        return {"value": self.values[index], "label": index % max(self.num_classes, 1), "index": index}

    def describe(self, index: int) -> str:
        return f"value {self.values[index]}"

    def fingerprint(self) -> str:
        return str(self.values)


def test_datasets_stand_one_after_the_other_under_the_labels_of_the_whole() -> None:
    whole = CombinedDataset([(Numbers([10, 11, 12], 2), [4, 0]), (Numbers([20], 1), [2])], ["a"] * 5)
    assert len(whole) == 4 and whole.num_classes == 5
    assert [(whole[k]["value"], whole[k]["label"], whole[k]["index"]) for k in range(4)] == [
        (10, 4, 0), (11, 0, 1), (12, 4, 2), (20, 2, 3),
    ]  # fmt: skip
    assert [whole.describe(k) for k in (2, 3)] == ["value 12", "value 20"]


def test_the_hash_of_datasets_changes_with_samples_labels_and_order() -> None:
    first, second = Numbers([1], 1), Numbers([2], 1)
    hashes = {
        CombinedDataset(parts, ["a", "b"]).fingerprint()
        for parts in (
            [(first, [0]), (second, [1])],
            [(first, [1]), (second, [0])],
            [(second, [0]), (first, [1])],
            [(first, [0])],
        )
    }
    assert len(hashes) == 4


def test_samples_without_classes_keep_label_0() -> None:
    assert CombinedDataset([(Numbers([5], 0), [])], [])[0]["label"] == 0

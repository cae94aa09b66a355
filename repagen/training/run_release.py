"""The end of a training run: its release folder with model card and sample grid, and the push to the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from repagen.config import to_plain
from repagen.data import CombinedDataset, DataConfig, SampleDataset
from repagen.errors import UserError
from repagen.evaluation.reporting import software_versions
from repagen.files import replace_folder
from repagen.hub.card import SAMPLES_FILE, CardFacts, Figure, LicenceFact, class_to_ask_for, render_card
from repagen.hub.folder_facts import facts_of_folder
from repagen.hub.publishing import CARD_FILE, publish_folder
from repagen.training.run import Run

# Where a run and its result lie: nothing of it belongs to the recipe.
_PRIVATE_KEYS = ("output_dir", "push_to_hub", "hub_private", "hub_revision")


def release_and_publish(
    run: Run,
    step: int,
    dataset: SampleDataset,
    *,
    folder: Path,
    save: Callable[[Path], None],
    draw: Callable[[Path], None],
    shows: str = "images of this model",
    prompt: str | None = None,
    licences: Sequence[LicenceFact] = (),
    base_model: str | None = None,
    base_revision: str | None = None,
) -> Path:
    """Write what a run made, with its card and sample grid, in one rename; push it where `push_to_hub` is set.

    Every process calls it; the main one writes and pushes.

    Args:
        run: of a training program.
        step: optimiser steps done.
        dataset: it was trained on.
        folder: of the release.
        save: writes the weights into a folder.
        draw: writes a PNG with samples, or with reconstructions.
        shows: what is on it, for the card.
        prompt: that the card asks for, of what takes text.
        licences: of parts that come from elsewhere.
        base_model: what the training went on from, as it is named in the configuration.
        base_revision: of it.

    Returns:
        The folder.

    Raises:
        UserError: the push failed; the release is whole, and the line says how to push it later.
    """

    def fill(temporary: Path) -> None:
        save(temporary)
        draw(temporary / SAMPLES_FILE)
        facts = _with_run(facts_of_folder(temporary, licences), run, step, dataset)
        base = _hub_id(base_model)
        facts = replace(facts, base_model=base, base_revision=base_revision if base else None)
        facts = replace(facts, samples=SAMPLES_FILE, samples_show=shows, prompt=prompt)
        (temporary / CARD_FILE).write_text(render_card(facts), encoding="utf-8")

    run.on_main(lambda: replace_folder(folder, fill))
    # An upload may take longer than the processes would wait for one another, so the others do not.
    if run.config.push_to_hub is not None and run.is_main:
        run.notice("published: %s", _push(run, folder))
    return folder


def _push(run: Run, folder: Path) -> str:
    config = run.config
    assert config.push_to_hub is not None
    try:
        return publish_folder(
            folder,
            config.push_to_hub,
            private=config.hub_private or None,
            revision=config.hub_revision,
            commit_message=f"Upload the {folder.name} of a {run.program} training",
        )
    except UserError as error:
        options = " --private" if config.hub_private else ""
        options += f" --revision {config.hub_revision}" if config.hub_revision else ""
        raise UserError(
            f"push_to_hub: {error}; the training is finished and its release is whole in {folder}: push it later with "
            f"`repagen push {folder} --to {config.push_to_hub}{options}`"
        ) from error


def _with_run(facts: CardFacts, run: Run, step: int, dataset: SampleDataset) -> CardFacts:
    """Add to what a folder says what its training does."""
    config = run.config
    data: DataConfig = getattr(config, "data")  # noqa: B009  # every program's configuration has one
    recipe = {"title": config.recipe.title, "paper": config.recipe.paper, "program": run.program}
    figures, remarks = figures_of_run(run.folder, step)
    hub_data = _hub_id(data.path) if data.kind == "datasets" else None
    if isinstance(dataset, CombinedDataset):
        facts = _with_classes(facts, dataset)
    return replace(
        facts,
        recipe={name: text for name, text in recipe.items() if text},
        config={key: value for key, value in to_plain(config).items() if key not in _PRIVATE_KEYS},
        data=_data_facts(data, dataset),
        datasets=(hub_data,) if hub_data else (),
        training=_training_facts(run, step),
        figures=figures,
        remarks=remarks,
    )


def _with_classes(facts: CardFacts, dataset: CombinedDataset) -> CardFacts:
    """Let the card ask for a class that was trained: the data's last one, which is new where any is."""
    _, labels = dataset.parts[0]
    if not labels:
        return replace(facts, num_classes=0)
    return replace(facts, num_classes=dataset.num_classes, example=class_to_ask_for(dataset.class_names, max(labels)))


def own_and_prior(dataset: SampleDataset) -> tuple[SampleDataset, int]:
    """Return the user's data, and how many images were drawn from the pipeline before the training to go beside it."""
    if not isinstance(dataset, CombinedDataset):
        return dataset, 0
    given = dataset.parts[0][0]
    return given, sum(len(part) for part, _ in dataset.parts if part is not given)


def _data_facts(data: DataConfig, dataset: SampleDataset) -> dict[str, str]:
    given, drawn = own_and_prior(dataset)
    facts = {
        "kind": data.kind,
        "path": data.path,
        "split": data.split if data.kind == "datasets" else None,
        "revision": data.revision,
        "images": f"{len(given) + drawn}, of them {drawn} drawn from the pipeline before the training"
        if drawn
        else len(given),
        "classes": given.num_classes or "none",
        "image size": f"{data.image_size} px",
        "fingerprint": dataset.fingerprint(),
    }
    if data.path and _hub_id(data.path) is None:
        facts["path"] = f".../{Path(data.path).expanduser().name}, on the machine it was trained on"
    return {name: str(value) for name, value in facts.items() if value is not None}


def _training_facts(run: Run, step: int) -> dict[str, str]:
    facts = {
        "optimiser steps": step,
        "images seen": step * run.plan.global_size,
        "batch": run.plan,
        "precision": run.config.precision,
        **software_versions(),
    }
    return {name: str(value) for name, value in facts.items()}


def figures_of_run(folder: Path, step: int) -> tuple[list[Figure], list[str]]:
    """Figures of the newest evaluation of a run, and what has to be said about them.

    Args:
        folder: of the run; its `evaluation` holds the results.
        step: the last one that counts.
    """
    records = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("evaluation/step-*.json")]
    past = [record for record in records if record["training"]["step"] <= step]
    if not past:
        return [], []
    record = max(past, key=lambda record: record["training"]["step"])
    figures = [_figure(record, name) for name in record["metrics"] if "_std" not in name]
    remarks = [f"{name} was left out: {reason}" for name, reason in record["left_out"].items()]
    remarks += [f"deviates from the protocol: {text}" for text in record["deviations"]]
    remarks += [f"not comparable: {text}" for text in record["remarks"]]
    if record["training"]["step"] != step:
        remarks.append(f"measured after {record['training']['step']} steps; the weights here are of step {step}")
    return figures, remarks


def _figure(record: Mapping[str, Any], name: str) -> Figure:
    spaces: Mapping[str, Mapping[str, str]] = record["spaces"]
    space = spaces.get(name.partition("_")[2]) or spaces.get("inception") or {}
    num_samples, num_reference = record["counts"].get(name, (record["num_samples"], record["num_reference"]))
    extractor = (
        f"{space['name']} ({space['settings']}; weights {space['weights_sha256'][:12]})" if space else "several"
    )
    reference = record["reference"]
    return Figure(
        metric=name,
        value=record["metrics"][name],
        protocol=record["protocol"],
        num_samples=num_samples,
        num_reference=num_reference,
        extractor=extractor,
        reference=reference.get("sha256") or reference.get("pixels_sha256") or "unknown",
        step=record["training"]["step"],
        comparable=record["comparable"],
    )


def _hub_id(name: str | None) -> str | None:
    """A name that means a repository on the Hub; None for a folder of this machine, or nothing."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if name is None or name.count("/") != 1 or Path(name).expanduser().exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name

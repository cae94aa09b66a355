"""Images of a Hugging Face dataset: from the Hub, a local folder or file, or `save_to_disk`; no script is ever run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from repagen.data.buckets import Size
from repagen.data.captions import KEYS, NO_CAPTION, Captions, captioned_samples, read_captions
from repagen.data.config import DataConfig
from repagen.data.dataset import ImageDataset
from repagen.data.images import BadImageError, decode_image, read_size
from repagen.data.labels import labels_of_names, labels_of_numbers
from repagen.errors import UserError
from repagen.files import state_of_files
from repagen.hub.places import repository_command

_FILE_BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}


class HuggingFaceDataset(ImageDataset):
    """A split of a Hugging Face dataset with an image column and, for classes, a label column.

    Labels are a `ClassLabel` column, an integer column (classes "0" ... "max") or a text column (its sorted values).
    The image column is found by its type, the label column as the only `ClassLabel`; with none there are no classes.
    Captions, where asked for, are the only text column, or the one named as in `KEYS`; a column holds texts or lists.

    Raises:
        UserError: the dataset, split or a column is not found or is ambiguous, a label is missing or negative, or
            captions are missing.
    """

    def __init__(self, config: DataConfig) -> None:
        table = _open_table(config)
        image_column = _find_image_column(table, config)
        label_column = _find_label_column(table, config)
        self._rows: Sequence[int] = range(len(table))
        if config.captions is not None:
            self.has_captions = True
            self._columns = _find_caption_columns(table, config, config.captions.columns, label_column)
            has = _have_captions(table, self._columns)
            rule, columns = config.captions.missing, config.captions.columns
            self._rows = captioned_samples(has, rule, lambda row: f"row {row}", columns)
            table = table.select(self._rows) if len(self._rows) < len(table) else table
            self._texts = table.select_columns(list(self._columns))
        labels, class_names = _read_labels(table, label_column)
        super().__init__(config, labels, class_names)
        self._content = table._fingerprint  # of the library: what the rows were made of, and how
        self._images = _undecoded(table, image_column)
        self._image_column = image_column

    def describe(self, index: int) -> str:
        """Return the row of image `index`, with its file name where the dataset keeps one."""
        name = self._images[index][self._image_column]
        file = f" ({name['path']})" if name and name.get("path") else ""
        return f"row {self._rows[index]}{file} of {self.config.path}, split {self.config.split}"

    def captions(self, index: int) -> Captions:
        """Return the captions of image `index`."""
        where = f"{self.config.path}, row {self._rows[index]}"
        return read_captions(self._texts[index], self._columns, where) or NO_CAPTION

    def _decode(self, index: int) -> Image.Image:
        return decode_image(self._source(index))

    def _original_size(self, index: int) -> Size:
        return read_size(self._source(index))

    def _source(self, index: int) -> bytes | Path:
        value = self._images[index][self._image_column]
        if not value:
            raise BadImageError("the row has no image")
        return value["bytes"] if value.get("bytes") is not None else Path(value["path"])

    def _hash_sources(self, digest: hashlib._Hash) -> None:
        config, info = self.config, self._images.info
        digest.update(f"{config.path}/{config.split}/{config.revision}/{info.version}/{info.dataset_size}".encode())

    def state(self) -> str:
        """See `ImageDataset.state`: fingerprints, ours and the library's, and when the tables were written."""
        files = state_of_files(Path(file["filename"]) for file in self._images.cache_files)
        return hashlib.sha256(f"{self.fingerprint()}/{self._content}/{files}".encode()).hexdigest()


def _open_table(config: DataConfig) -> Any:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    name = str(config.path)
    local = Path(name).expanduser()
    if not local.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(
            f"data.path: {name} does not exist; allowed: a folder, a file, or a Hub id such as user/dataset"
        )
    try:
        table = _load(datasets, local, config)
    except UserError:
        raise
    except (datasets.exceptions.DatasetsError, HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        remedy = (
            "check the split, and that the files there are whole"
            if local.exists()
            else "check the id, the split, access rights (hf auth login) and the network, or get it with "
            f"{repository_command(name, config.revision, dataset=True)}"
        )
        raise UserError(
            f"data.path: dataset {name}, data.split {config.split} could not be opened: {type(error).__name__}: "
            f"{reason}; {remedy}"
        ) from error
    splits = table if isinstance(table, datasets.DatasetDict) else {str(table.split or config.split): table}
    if config.split not in splits:
        raise UserError(f"data.split: {config.split} given; {name} holds {', '.join(splits)}")
    table = splits[config.split]
    if len(table) == 0:
        raise UserError(f"data.path: dataset {name}, data.split {config.split} has no rows")
    return table


def _load(datasets: Any, local: Path, config: DataConfig) -> Any:
    if not local.exists():
        downloaded = _downloaded(config)
        if downloaded is not None:
            return datasets.load_dataset(str(downloaded), split=config.split)
        return datasets.load_dataset(config.path, split=config.split, revision=config.revision)
    if (local / "dataset_dict.json").exists() or (local / "state.json").exists():
        return datasets.load_from_disk(str(local))
    if local.is_file():
        if local.suffix not in _FILE_BUILDERS:
            raise UserError(f"data.path: {local} given; allowed files: {', '.join(_FILE_BUILDERS)}")
        files = {config.split: str(local)}
        return datasets.load_dataset(_FILE_BUILDERS[local.suffix], data_files=files, split=config.split)
    return datasets.load_dataset(str(local), split=config.split)


def _downloaded(config: DataConfig) -> Path | None:
    """Return the repository in the Hub's cache, offline; `datasets` looks only for tables it prepared."""
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if not is_offline_mode():
        return None
    try:
        return Path(snapshot_download(str(config.path), repo_type="dataset", revision=config.revision))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _find_image_column(table: Any, config: DataConfig) -> str:
    import datasets

    if config.image_column is not None:
        return _existing(table, config.image_column, "image_column")
    found = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if len(found) != 1:
        raise UserError(
            f"data.image_column: nothing given and {config.path} has {len(found)} image columns; its columns: "
            f"{_columns(table)}; name one"
        )
    return found[0]


def _find_label_column(table: Any, config: DataConfig) -> str | None:
    import datasets

    if config.label_column is not None:
        return _existing(table, config.label_column, "label_column")
    found = [name for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(found) > 1:
        raise UserError(
            f"data.label_column: nothing given and {config.path} has {len(found)} label columns; its columns: "
            f"{_columns(table)}; name one"
        )
    return found[0] if found else None


def _find_caption_columns(
    table: Any, config: DataConfig, asked: Mapping[str, float], label_column: str | None
) -> dict[str, float]:
    """=> name and weight of the columns that hold captions."""
    if asked:
        return {_existing(table, name, "captions.columns"): weight for name, weight in asked.items()}
    texts = [name for name, feature in table.features.items() if _holds_texts(feature) and name != label_column]
    found = [name for name in KEYS if name in texts] or texts
    if not found or (len(found) > 1 and found[0] not in KEYS):
        raise UserError(
            f"data.captions.columns: nothing given and {config.path} has {len(found)} text columns; its columns: "
            f"{_columns(table)}; name one or more with their weights, such as data.captions.columns.NAME=1"
        )
    return {found[0]: 1.0}


def _holds_texts(feature: Any) -> bool:
    inner = getattr(feature, "feature", feature)  # of a list
    return getattr(inner, "dtype", None) in ("string", "large_string")


def _have_captions(table: Any, columns: Mapping[str, float]) -> Iterator[bool]:
    row = 0
    for batch in table.select_columns(list(columns)).iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            texts = dict(zip(batch, values, strict=True))
            yield read_captions(texts, columns, f"row {row}") is not None
            row += 1


def _existing(table: Any, column: str, key: str) -> str:
    if column not in table.features:
        raise UserError(f"data.{key}: {column} given; allowed: the columns {_columns(table)}")
    return column


def _columns(table: Any) -> str:
    return ", ".join(f"{name} ({type(feature).__name__})" for name, feature in table.features.items())


def _undecoded(table: Any, column: str) -> Any:
    """Return the image column alone, as bytes or path, so that images are decoded by our own rules."""
    import datasets
    import pyarrow

    try:
        return table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(
            f"data.image_column: {column} holds no images ({type(error).__name__}); columns: {_columns(table)}"
        ) from error


def _read_labels(table: Any, column: str | None) -> tuple[torch.Tensor, list[str]]:
    import datasets

    if column is None:
        return torch.zeros(len(table), dtype=torch.int64), []
    feature = table.features[column]
    values = table.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    missing = next((row for row, value in enumerate(values) if value is None), None)
    if missing is not None:
        raise UserError(f"data.label_column: {column} has no label in row {missing}")
    if all(isinstance(value, str) for value in values):
        return labels_of_names(values)
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        raise UserError(
            f"data.label_column: {column} is {type(feature).__name__}; allowed: ClassLabel, integers or text"
        )
    if min(values) < 0:
        row = values.index(min(values))
        raise UserError(
            f"data.label_column: {column} is {min(values)} in row {row}; a split without labels has no classes"
        )
    labels, numbers = labels_of_numbers(values)
    return labels, list(feature.names) if isinstance(feature, datasets.ClassLabel) else numbers

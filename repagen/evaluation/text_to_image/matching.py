"""Which image of a folder belongs to which prompt."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from repagen.errors import UserError
from repagen.evaluation.samples import FolderImages
from repagen.evaluation.text_to_image.prompted import PromptedImages
from repagen.evaluation.text_to_image.prompts import PromptSet, natural_key

Matching = Literal["id", "number", "order"]
_Separator = Literal["/", "_", "-", ""]
"""Between id and number of an image; the last is a name that is the id alone, of a single image."""


class PromptImages(FolderImages, PromptedImages):
    """The images of a folder in the order of their prompts: image i belongs to prompt i // images_per_prompt.

    Prompts that have ids are matched by `id`: all images are named `<id>/<n>.png`, `<id>_<n>.png` or `<id>-<n>.png`,
    n from 0 or 1 on, with or without leading zeros; or `<id>.png` where a prompt has one image. Others are matched in
    the first of these ways that fits the names:

    - `number`: `0.png`, `1.png` ... (or from 1, with or without leading zeros) directly in the folder;
    - `order`: by path, in the order of `natural_key`, which is also that of a folder of prompts.

    Args:
        folder: searched with its subfolders.
        prompts: what the images were made from.
        images_per_prompt: how many images each prompt has; they follow each other.
        by_order: match prompts that have ids by `number` or `order` all the same; no image may carry an id.

    Raises:
        UserError: when images are missing, there are more than prompts, or names do not say whose they are; naming
            both counts and the first.
    """

    def __init__(
        self, folder: str | Path, prompts: PromptSet, images_per_prompt: int = 1, *, by_order: bool = False
    ) -> None:
        super().__init__(folder)
        if images_per_prompt < 1:
            raise UserError(f"images_per_prompt must be at least 1, got {images_per_prompt}")
        if by_order and not prompts.named:
            raise UserError(f"{prompts.path}: its prompts have no ids, and are matched by order anyway; drop by_order")
        self.prompts = prompts
        self.images_per_prompt = images_per_prompt
        if by_order:
            self._refuse_ids()
        self.paths, self.matching = self._by_id() if prompts.named and not by_order else self._by_position()

    @property
    def protocol(self) -> dict[str, Any]:
        """Kind, folder, and how images and prompts were matched."""
        return {**super().protocol, "images_per_prompt": self.images_per_prompt, "matched_by": self.matching}

    # --- by id -------------------------------------------------------------------------------------------------------

    def _by_id(self) -> tuple[list[Path], Matching]:
        """Paths in order, by the one way to write ids and numbers that most of the names follow."""
        ids = {prompt.id for prompt in self.prompts.prompts}
        separators: tuple[_Separator, ...] = ("", "/", "_", "-")
        readings = {
            separator: [_read_name(path, self.folder, ids, separator) for path in self.paths]
            for separator in separators[self.images_per_prompt > 1 :]
        }
        separator, keys = max(readings.items(), key=lambda reading: sum(key is not None for key in reading[1]))
        if not any(keys):
            raise self._without_ids()
        first = 0 if any(key and key[1] == 0 for key in keys) else 1
        wanted: dict[Hashable, str] = {
            (prompt.id, number): f"{prompt.id}{separator}{number if separator else ''}"
            for prompt in self.prompts.prompts
            for number in range(first, first + self.images_per_prompt)
        }
        return self._arranged([key or path for key, path in zip(keys, self.paths, strict=True)], wanted), "id"

    def _without_ids(self) -> UserError:
        names = ("<id>.png, " if self.images_per_prompt == 1 else "") + "<id>/<n>.png, <id>_<n>.png or <id>-<n>.png"
        return UserError(
            f"{self.folder}: {len(self.paths)} images for {self._needed()}, and none is named after a prompt (there "
            f"is {self.describe(0)}, and prompt {self.prompts.prompts[0].id}); name them {names}, or, where no name "
            "has an id and prompts and images were counted in the same order, give --by-order"
        )

    def _refuse_ids(self) -> None:
        ids = "|".join(re.escape(prompt.id) for prompt in self.prompts.prompts)
        has_id = re.compile(rf"(?<![^\W_])(?:{ids})(?![^\W_])")
        for index, path in enumerate(self.paths):
            if found := has_id.search(path.relative_to(self.folder).with_suffix("").as_posix()):
                raise UserError(
                    f"{self.folder}: {self.describe(index)} has the id of prompt {found[0]}, so that --by-order may "
                    "give it to another one; leave --by-order out, or rename the images"
                )

    # --- by position -------------------------------------------------------------------------------------------------

    def _by_position(self) -> tuple[list[Path], Matching]:
        expected = len(self.prompts) * self.images_per_prompt
        if all(path.stem.isdecimal() and path.parent == self.folder for path in self.paths):
            numbers = [int(path.stem) for path in self.paths]
            first = 0 if 0 in numbers else 1
            return self._arranged(numbers, {first + index: str(first + index) for index in range(expected)}), "number"
        if len(self.paths) != expected:
            raise self._mismatch(self._place(len(self.paths)) if len(self.paths) < expected else None)
        return sorted(self.paths, key=lambda path: natural_key(path.relative_to(self.folder).as_posix())), "order"

    def _arranged(self, keys: Sequence[Hashable], wanted: Mapping[Hashable, str]) -> list[Path]:
        """Paths in the order of the wanted keys; `keys` are theirs, `wanted` says how each is named."""
        found: dict[Hashable, Path] = {}
        for key, path in zip(keys, self.paths, strict=True):
            if key in found:
                both = " and ".join(one.relative_to(self.folder).as_posix() for one in (found[key], path))
                raise UserError(f"{self.folder}: both {both} are image {wanted.get(key, path.stem)}; remove one")
            found[key] = path
        missing = next((index for index, key in enumerate(wanted) if key not in found), None)
        if missing is not None:
            raise self._mismatch(f"{self._place(missing)}, looked for {[*wanted.values()][missing]}.png")
        extra = next((path for key, path in found.items() if key not in wanted), None)
        if extra is not None:
            raise self._mismatch(None, f"; {extra.relative_to(self.folder).as_posix()} belongs to no prompt")
        return [found[key] for key in wanted]

    def _place(self, index: int) -> str:
        number, image = divmod(index, self.images_per_prompt)
        return f"image {image + 1} of prompt {self.prompts.prompts[number].id}"

    def _needed(self) -> str:
        return f"{len(self.prompts)} prompts x {self.images_per_prompt} = {len(self.prompts) * self.images_per_prompt}"

    def _mismatch(self, missing: str | None, extra: str = "") -> UserError:
        which = f"; the first missing is {missing}" if missing else extra
        return UserError(
            f"{self.folder}: {len(self.paths)} images, but {self._needed()} are needed{which}; complete the folder, "
            "or correct --prompts or --images-per-prompt"
        )


def _read_name(path: Path, folder: Path, ids: set[str], separator: _Separator) -> tuple[str, int] | None:
    """Id and number that an image's name has, where it is written with this separator; the number of an id alone is 0.

    A name below the folder of one prompt is none of another prompt.
    """
    parent = path.parent.name if path.parent != folder else ""
    if separator == "/":
        name, number = parent, path.stem
    else:
        name, _, number = path.stem.rpartition(separator) if separator else (path.stem, "", "0")
        if parent in ids and parent != name:
            return None
    return (name, int(number)) if name in ids and number.isdecimal() else None

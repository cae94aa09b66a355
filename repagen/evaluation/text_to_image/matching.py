"""Which image of a folder belongs to which prompt."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from repagen.errors import UserError
from repagen.evaluation.samples import FolderImages
from repagen.evaluation.text_to_image.prompts import PromptSet

Matching = Literal["id", "number", "order"]


class PromptImages(FolderImages):
    """The images of a folder in the order of their prompts: image i belongs to prompt i // images_per_prompt.

    Matched in the first of these ways that fits the names:

    - `id`: `<id>.png`, or `<id>_0.png`, `<id>_1.png` ... for several images a prompt, where the prompts have ids;
    - `number`: `0.png`, `1.png` ... (or from 1, with or without leading zeros) directly in the folder;
    - `order`: by path, numbers within it compared as numbers.

    Args:
        folder: searched with its subfolders.
        prompts: what the images were made from.
        images_per_prompt: how many images each prompt has; they follow each other.

    Raises:
        UserError: when images are missing, or there are more than prompts; naming both counts and the first.
    """

    def __init__(self, folder: str | Path, prompts: PromptSet, images_per_prompt: int = 1) -> None:
        super().__init__(folder)
        if images_per_prompt < 1:
            raise UserError(f"images_per_prompt must be at least 1, got {images_per_prompt}")
        self.prompts = prompts
        self.images_per_prompt = images_per_prompt
        self.paths, self.matching = self._match(self.paths)

    @property
    def protocol(self) -> dict[str, Any]:
        """Kind, folder, and how images and prompts were matched."""
        return {**super().protocol, "images_per_prompt": self.images_per_prompt, "matched_by": self.matching}

    def _match(self, paths: Sequence[Path]) -> tuple[list[Path], Matching]:
        stems = [path.stem for path in paths]
        if self.prompts.named and set(stems) & set(names := list(self._names())):
            return self._by_name(paths, stems, names), "id"
        expected = len(self.prompts) * self.images_per_prompt
        if all(stem.isdecimal() and path.parent == self.folder for stem, path in zip(stems, paths, strict=True)):
            numbers = [str(int(stem)) for stem in stems]
            first = 0 if "0" in numbers else 1
            names = [str(first + index) for index in range(expected)]
            return self._by_name(paths, numbers, names), "number"
        if len(paths) != expected:
            raise self._mismatch(len(paths), self._place(len(paths)) if len(paths) < expected else None)
        return sorted(paths, key=self._natural), "order"

    def _names(self) -> Iterator[str]:
        for prompt in self.prompts.prompts:
            if self.images_per_prompt == 1:
                yield prompt.id
            else:
                yield from (f"{prompt.id}_{number}" for number in range(self.images_per_prompt))

    def _by_name(self, paths: Sequence[Path], stems: Sequence[str], names: Sequence[str]) -> list[Path]:
        """Paths in the order of the names that they must have."""
        found: dict[str, Path] = {}
        for stem, path in zip(stems, paths, strict=True):
            if stem in found:
                raise UserError(f"{self.folder}: both {found[stem].name} and {path.name} are image {stem}; remove one")
            found[stem] = path
        missing = next((index for index, name in enumerate(names) if name not in found), None)
        if missing is not None:
            raise self._mismatch(len(paths), f"{self._place(missing)}, looked for {names[missing]}.png")
        if len(found) > len(names):
            extra = next(path.name for stem, path in found.items() if stem not in set(names))
            raise self._mismatch(len(paths), None, f"; {extra} belongs to no prompt")
        return [found[name] for name in names]

    def _place(self, index: int) -> str:
        number, image = divmod(index, self.images_per_prompt)
        return f"image {image + 1} of prompt {self.prompts.prompts[number].id}"

    def _mismatch(self, found: int, missing: str | None, extra: str = "") -> UserError:
        needed = (
            f"{len(self.prompts)} prompts x {self.images_per_prompt} = {len(self.prompts) * self.images_per_prompt}"
        )
        which = f"; the first missing is {missing}" if missing else extra
        return UserError(
            f"{self.folder}: {found} images, but {needed} are needed{which}; complete the folder, or correct "
            "--prompts or --images-per-prompt"
        )

    def _natural(self, path: Path) -> list[tuple[int, int, str]]:
        words = re.split(r"(\d+)", path.relative_to(self.folder).as_posix())
        return [(1, int(word), "") if word.isdecimal() else (0, 0, word) for word in words]

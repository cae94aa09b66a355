"""From what a user names (recipe, protocol, published file, Hub id) to what it needs."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from repagen.config import flatten, load_config, nearest, preset_names, read_preset
from repagen.encoders.files import hub_id
from repagen.errors import UserError
from repagen.evaluation.protocol import load_protocol, protocol_names
from repagen.offline.needs import BLANK, Need, needs_of_config, needs_of_protocol
from repagen.offline.published import PUBLISHED_FILES
from repagen.training.decoder_config import DecoderConfig
from repagen.training.end_to_end_config import EndToEndConfig
from repagen.training.finetune_config import load_finetune_config
from repagen.training.generator_config import GeneratorConfig
from repagen.training.text_to_image_config import TextToImageConfig

PROGRAMS: dict[str, Callable[[str, Sequence[str]], Any]] = {
    "generator": partial(load_config, GeneratorConfig),
    "text_to_image": partial(load_config, TextToImageConfig),
    "decoder": partial(load_config, DecoderConfig),
    "end_to_end": partial(load_config, EndToEndConfig),
    "finetune": load_finetune_config,
}
"""Training programs => what loads their configurations, from name and `key=value` words."""


@dataclass(frozen=True)
class Request:
    """What a user asks for.

    Attributes:
        name: a preset, a YAML file, a protocol, a published file, `timm:NAME` or a Hub id.
        words: `key=value` overrides of a recipe.
        revision: of a Hub id.
        with_data: the dataset too; with a Hub id: it is one of a dataset.
    """

    name: str
    words: tuple[str, ...] = ()
    revision: str | None = None
    with_data: bool = False

    @property
    def command(self) -> str:
        """The command that asks for it, without `--to DIR`."""
        revision = ["--revision", self.revision] if self.revision else []
        data = ["--with-data"] if self.with_data else []
        return shlex.join(["repagen", "download", self.name, *self.words, *revision, *data])

    def needs(self) -> list[Need]:
        """List what is needed, each thing once for every key that asks for it.

        Raises:
            UserError: for a name that is nothing of that, a wrong key, or an option that does not fit.
        """
        if self.name in preset_names() or Path(self.name).is_file():
            return self._of_recipe()
        if self.words:
            raise UserError(f"{self.words[0]}: only a recipe takes key=value, and {self.name!r} is none")
        if self.name in protocol_names() or self.name in PUBLISHED_FILES:
            if self.revision or self.with_data:
                raise UserError(f"{'--revision' if self.revision else '--with-data'}: does not fit {self.name!r}")
            if self.name in PUBLISHED_FILES:
                return [Need("file", self.name, "command line")]
            return needs_of_protocol(self.name, load_protocol(self.name))
        return [self._of_hub_id()]

    def _of_recipe(self) -> list[Need]:
        if self.revision:
            raise UserError(f"--revision: of a Hub id; a recipe has keys for it, and {self.name!r} is a recipe")
        return needs_of_config(load_recipe(self.name, self.words), with_data=self.with_data)

    def _of_hub_id(self) -> Need:
        if "/" not in self.name and not self.name.startswith("timm:"):
            known = [*preset_names(), *protocol_names(), *PUBLISHED_FILES]
            raise UserError(
                f"{self.name!r}: nothing of that name{nearest(self.name, known)}; give a recipe (`repagen recipes`), "
                f"a YAML file, a protocol ({', '.join(protocol_names())}), a file ({', '.join(PUBLISHED_FILES)}) or a "
                "Hub id such as org/name"
            )
        if Path(self.name).is_dir():
            raise UserError(f"{self.name}: a folder on this machine; there is nothing to download")
        if self.name.startswith("timm:"):
            return Need("encoder", hub_id(self.name), "command line", self.revision)
        hub_id(self.name)
        return Need("dataset" if self.with_data else "model", self.name, "command line", self.revision)


def load_recipe(name: str, words: Sequence[str] = ()) -> Any:
    """Load a recipe with the configuration of its program; required values that nobody gave are `BLANK`.

    Raises:
        UserError: as `load_config`.
    """
    plain = read_preset(name)
    given = {word.partition("=")[0] for word in words}
    blanks = [key for key, value in flatten(plain).items() if value == "???" and key not in given]
    filled = [*words, *(f"{key}={BLANK}" for key in blanks)]
    program = (plain.get("recipe") or {}).get("program")
    if program in PROGRAMS:
        return PROGRAMS[program](name, filled)
    refusals = []
    for load in PROGRAMS.values():  # a file of one's own need not say which program it is for
        try:
            return load(name, filled)
        except UserError as error:
            refusals.append(error)
    raise refusals[0]

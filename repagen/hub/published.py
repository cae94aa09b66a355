"""`push_to_hub` of models, schedulers and pipelines, with a model card of ours."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusers import ModelMixin

from repagen.errors import UserError
from repagen.hub.card import LicenceFact
from repagen.hub.publishing import publish_folder

HUB_OPTIONS = ("repo_id", "commit_message", "private", "token", "create_pr", "revision")
"""What methods that save take for a push beside `push_to_hub`."""


def require_safetensors(safe: bool) -> None:
    """Refuse to publish weights in torch's own format.

    Raises:
        UserError: `safe` is False.
    """
    if not safe:
        raise UserError("safe_serialization=False: only safetensors are published; leave it out")


class PublishedMixin:
    """Stands before diffusers' `ModelMixin`, `SchedulerMixin` or `DiffusionPipeline`, for what they do about the Hub.

    Theirs would write a card of the library diffusers, whose lines do not load our classes.
    """

    def part_licences(self) -> Sequence[LicenceFact]:
        """Licences of parts that come from elsewhere, for the model card."""
        return ()

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        *,
        revision: str | None = None,
    ) -> str:
        """Save and upload to the Hub with a model card, in one commit; return the commit's address.

        Args:
            repo_id: as "org/name"; created if needed.
            commit_message, private, token, create_pr, subfolder, revision: see `publish_folder`.
            safe_serialization, variant: see `save_pretrained`.

        Raises:
            UserError: `safe_serialization=False`, or the Hub refuses or cannot be reached; it names the cause.
        """
        require_safetensors(safe_serialization)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant)
            return publish_folder(
                Path(folder),
                repo_id,
                private=private,
                revision=revision,
                commit_message=commit_message,
                token=token,
                licences=self.part_licences(),
                subfolder=subfolder,
                create_pr=create_pr,
            )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save into a folder, as diffusers does; with `push_to_hub=True` upload it afterwards.

        Args:
            args, kwargs: see the same method of diffusers' `ModelMixin` and `DiffusionPipeline`. The repository is
                `repo_id` or, where that is not given, one of the folder's name; `private`, `token`, `commit_message`,
                `create_pr` and `revision` are those of `publish_folder`.

        Raises:
            UserError: `safe_serialization=False` with a push; the Hub refuses or cannot be reached: the folder is
                whole then.
        """
        push = kwargs.pop("push_to_hub", False)
        options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        require_safetensors(not push or kwargs.get("safe_serialization", True))
        super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
        if push and kwargs.get("is_main_process", True):
            folder = Path(args[0] if args else kwargs["save_directory"])
            repo_id = options.pop("repo_id", folder.name)
            publish_folder(folder, repo_id, licences=self.part_licences(), **options)


class PublishedModelMixin(PublishedMixin):
    """The same for a `ModelMixin`: pipelines read the names of the method's parameters from its signature."""

    save_pretrained: Any = functools.wraps(ModelMixin.save_pretrained)(
        lambda self, *args, **kwargs: PublishedMixin.save_pretrained(self, *args, **kwargs)
    )

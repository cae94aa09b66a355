"""Saved models of which no tensor may be missing."""

from __future__ import annotations

from typing import Any

from repagen.errors import UserError
from repagen.hub.saved_models import SavedModelMixin


class WholeModelMixin(SavedModelMixin):
    """Also refuses files that lack tensors of the model."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load what `save_pretrained` wrote; see `ModelMixin.from_pretrained`.

        Raises:
            UserError: for a folder that is refused, or a file that lacks tensors, naming them.
        """
        with_report = kwargs.pop("output_loading_info", False)
        model, report = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        if missing := sorted(report["missing_keys"]):
            raise UserError(
                f"{pretrained_model_name_or_path}: {len(missing)} tensors of the {cls.__name__} are missing, the "
                f"first is {missing[0]}"
            )
        return (model, report) if with_report else model

"""Saved models whose files hold the tensors of their network, no fewer and no others."""

from __future__ import annotations

from typing import Any

from repagen.errors import UserError
from repagen.hub.saved_models import SavedModelMixin


class WholeModelMixin(SavedModelMixin):
    """Also refuses files whose tensors are not those of the config's network; diffusers alone goes on."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load what `save_pretrained` wrote; see `ModelMixin.from_pretrained`.

        Raises:
            UserError: for a folder that is refused, or a file that lacks tensors or has others, naming the first.
        """
        with_report = kwargs.pop("output_loading_info", False)
        model, report = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        for key, fault in (("missing_keys", "missing"), ("unexpected_keys", "too many")):
            if names := sorted(report[key]):
                raise UserError(
                    f"{pretrained_model_name_or_path}: {len(names)} tensors of the {cls.__name__} are {fault}, the "
                    f"first is {names[0]}; the weights are not those of this config.json, get both anew"
                )
        return (model, report) if with_report else model

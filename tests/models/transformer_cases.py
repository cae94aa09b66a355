"""Tiny instances of the generators, with weights that make every part of them matter."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch

from repagen import (
    DDPMDiTTransformer2DModel,
    DDTTransformer2DModel,
    DiTDHTransformer2DModel,
    ELTTransformer2DModel,
    LightningDiTTransformer2DModel,
    RAEv2Transformer2DModel,
    SiTTransformer2DModel,
)


class Case(NamedTuple):
    model_class: type[Any]
    config: dict[str, Any]
    training_options: Mapping[str, Any] = MappingProxyType({})  # let a loss of what the call returns reach everything

    @property
    def takes_text(self) -> bool:
        """Whether the model takes text in place of classes."""
        return "text_dim" in self.config

    @property
    def num_loops(self) -> int:
        """How often a forward pass calls each block."""
        return self.config.get("num_loops", 1)

    @property
    def out_channels(self) -> int:
        """Channels of the output: a DDPM's holds a variance too."""
        return self.config["in_channels"] * (2 if self.model_class.discrete_time else 1)


SIT = Case(
    SiTTransformer2DModel,
    {"sample_size": 8, "in_channels": 4, "hidden_size": 32, "depth": 3, "num_heads": 2, "num_classes": 10},
)
DIT = Case(DDPMDiTTransformer2DModel, SIT.config)
LIGHTNINGDIT = Case(LightningDiTTransformer2DModel, {**SIT.config, "qk_norm": True})
DITDH = Case(
    DiTDHTransformer2DModel,
    {
        "sample_size": 4,
        "in_channels": 12,
        "hidden_size": 32,
        "depth": 3,
        "num_heads": 2,
        "head_hidden_size": 48,
        "head_depth": 2,
        "head_num_heads": 2,
        "num_classes": 10,
    },
)
RAEV2 = Case(
    RAEv2Transformer2DModel,
    {**DITDH.config, "base_depth": 2, "head_num_heads": 4},
    training_options={"return_base": True},
)
DDT = Case(
    DDTTransformer2DModel,
    {key: value for key, value in DITDH.config.items() if key not in ("head_hidden_size", "head_num_heads")}
    | {"sample_size": 8, "in_channels": 4},
)
ELT = Case(ELTTransformer2DModel, {**SIT.config, "num_loops": 3})


def with_text(case: Case, text_conditioning: str) -> Case:
    config = {key: value for key, value in case.config.items() if key != "num_classes"}
    return case._replace(config={**config, "text_dim": 20, "text_conditioning": text_conditioning})


TEXT_CASES = {
    "ditdh-in-context": with_text(DITDH, "in_context"),
    "ditdh-across": with_text(DITDH, "cross_attention"),
    "raev2-in-context": with_text(RAEV2, "in_context"),
    "raev2-across": with_text(RAEV2, "cross_attention"),
}
CASES = {"sit": SIT, "dit": DIT, "lightningdit": LIGHTNINGDIT, "ditdh": DITDH, "raev2": RAEV2, "ddt": DDT, "elt": ELT}
# The other two combine the same parts; what is theirs alone is in test_transformer_text.py.
CASES |= {name: TEXT_CASES[name] for name in ("ditdh-across", "raev2-in-context")}
all_generators = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
all_text_generators = pytest.mark.parametrize("case", TEXT_CASES.values(), ids=TEXT_CASES.keys())


def fill_(model: torch.nn.Module) -> None:
    """Draw every parameter, those initialised to zero too."""
    for name, parameter in model.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
        torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=fan_in**-0.5)


def build(case: Case, **overrides: Any) -> Any:
    torch.manual_seed(0)
    model = case.model_class(**{**case.config, **overrides})
    fill_(model)
    return model.eval()


def inputs(case: Case, batch_size: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = case.config["sample_size"]
    latents = torch.randn(batch_size, case.config["in_channels"], size, size, generator=generator)
    time = torch.linspace(0.1, 0.9, batch_size) * (1000 if case.model_class.discrete_time else 1)
    if not case.takes_text:
        condition = {"class_labels": torch.arange(batch_size) * 7 % 11}
    else:  # prompts of 4, 0 (none), 2, 4 ... tokens
        lengths = (torch.arange(batch_size) * 2 + 4) % 6
        condition = {
            "encoder_hidden_states": torch.randn(batch_size, 5, case.config["text_dim"], generator=generator),
            "encoder_attention_mask": torch.arange(5) < lengths[:, None],
        }
    return {"hidden_states": latents, "timestep": time, **condition}


@torch.no_grad()
def output(model: Any, case: Case, **overrides: torch.Tensor) -> torch.Tensor:
    return model(**{**inputs(case), **overrides}, return_dict=False)[0]


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Length of the difference over the length of what is expected."""
    return ((result.float() - expected).norm() / expected.norm()).item()

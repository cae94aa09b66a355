"""Tiny instances of both generators, with weights that make every part of them matter."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from repagen import DiTDHTransformer2DModel, SiTTransformer2DModel


class Case(NamedTuple):
    model_class: type
    config: dict[str, Any]


SIT = Case(
    SiTTransformer2DModel,
    {"sample_size": 8, "in_channels": 4, "hidden_size": 32, "depth": 3, "num_heads": 2, "num_classes": 10},
)
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
both_generators = pytest.mark.parametrize("case", [SIT, DITDH], ids=["sit", "ditdh"])


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
    return {
        "hidden_states": torch.randn(batch_size, case.config["in_channels"], size, size, generator=generator),
        "timestep": torch.linspace(0.1, 0.9, batch_size),
        "class_labels": torch.arange(batch_size) * 7 % 11,
    }


@torch.no_grad()
def output(model: Any, case: Case, **overrides: torch.Tensor) -> torch.Tensor:
    return model(**{**inputs(case), **overrides}, return_dict=False)[0]


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Length of the difference over the length of what is expected."""
    return ((result.float() - expected).norm() / expected.norm()).item()

"""The straight path between data and noise, and what a network may predict on it.

Throughout: x (B, ...) is data, noise (B, ...) is standard normal, t (B,) or a number lies in [0, 1] with t = 0 data
and t = 1 noise. Sources: flow matching (2210.02747), SiT (2401.08740), RAE (2510.11690).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from repagen.errors import UserError

PredictionType = Literal["velocity", "sample", "epsilon"]
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)

# Networks that predict data are trained with t no closer to 0 than this in the division by t (JiT, RAEv2).
MINIMUM_TIME = 0.05


def broadcast_time(t: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """Return t as float32 on `like`'s device, shaped to broadcast over `like`'s trailing dimensions.

    Args:
        t: (B,), a scalar tensor or a number.
        like: (B, ...).

    Raises:
        UserError: t is neither a scalar nor one time per sample.
    """
    times = t if isinstance(t, torch.Tensor) else torch.tensor(t)
    times = times.to(like.device, torch.float32)
    if times.ndim == 0:
        return times
    if times.ndim != 1 or times.shape[0] != like.shape[0]:
        raise UserError(
            f"t has shape {tuple(times.shape)}; give a number or one time for each of {like.shape[0]} samples"
        )
    return times.reshape(-1, *[1] * (like.ndim - 1))


def interpolate(x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
    """Point of the path: x_t = (1 - t) x + t noise, shape (B, ...)."""
    t = broadcast_time(t, x)
    return (1 - t) * x + t * noise


def velocity_target(x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Velocity of the path, dx_t/dt = noise - x, shape (B, ...)."""
    return noise - x


def to_velocity(
    prediction: torch.Tensor,
    x_t: torch.Tensor,
    t: torch.Tensor | float,
    prediction_type: PredictionType,
    minimum_time: float = MINIMUM_TIME,
) -> torch.Tensor:
    """Velocity that a prediction at x_t stands for, shape (B, ...).

    Args:
        prediction: network output (B, ...) in `prediction_type`.
        x_t: the network's input (B, ...).
        t: its times in [0, 1].
        prediction_type: "velocity" is returned as it is; "sample" gives (x_t - prediction) / max(t, minimum_time);
            "epsilon" gives (prediction - x_t) / max(1 - t, minimum_time).
        minimum_time: floor of t and of 1 - t in the divisions by them.

    Raises:
        UserError: unknown `prediction_type`.
    """
    if prediction_type == "velocity":
        return prediction
    t = broadcast_time(t, x_t)
    if prediction_type == "sample":
        return (x_t - prediction) / t.clamp(min=minimum_time)
    if prediction_type == "epsilon":
        return (prediction - x_t) / (1 - t).clamp(min=minimum_time)
    raise _unknown_prediction_type(prediction_type)


def to_sample(
    prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor | float, prediction_type: PredictionType
) -> torch.Tensor:
    """Data estimate that a prediction at x_t stands for: x_t - t v, shape (B, ...).

    A "sample" prediction is returned as it is. Arguments and errors as in `to_velocity`.
    """
    if prediction_type == "sample":
        return prediction
    return x_t - broadcast_time(t, x_t) * to_velocity(prediction, x_t, t, prediction_type)


def to_epsilon(
    prediction: torch.Tensor,
    x_t: torch.Tensor,
    t: torch.Tensor | float,
    prediction_type: PredictionType,
    minimum_time: float = MINIMUM_TIME,
) -> torch.Tensor:
    """Noise estimate that a prediction at x_t stands for: x_t + (1 - t) v, shape (B, ...).

    An "epsilon" prediction is returned as it is. Arguments and errors as in `to_velocity`.
    """
    if prediction_type == "epsilon":
        return prediction
    return x_t + (1 - broadcast_time(t, x_t)) * to_velocity(prediction, x_t, t, prediction_type, minimum_time)


def score_from_velocity(velocity: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
    """Score of the marginal at x_t: -(x_t + (1 - t) v) / t, shape (B, ...); t > 0 (SiT, equation 9)."""
    t = broadcast_time(t, x_t)
    return -(x_t + (1 - t) * velocity) / t


def _unknown_prediction_type(prediction_type: str) -> UserError:
    return UserError(f"prediction_type is {prediction_type!r}; allowed: {', '.join(PREDICTION_TYPES)}")

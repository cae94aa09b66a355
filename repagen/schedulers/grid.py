"""What repagen's samplers share: an explicit grid of times, shifted once, and the place reached on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, SchedulerMixin

from repagen.errors import UserError
from repagen.flow.time import TimeShift
from repagen.hub.published import PublishedMixin


class ExplicitGridScheduler(PublishedMixin, SchedulerMixin, ConfigMixin):
    """Base of the samplers that walk a grid of times from noise (sigma = t = 1) towards data (0).

    A subclass registers at least `num_train_timesteps` and `shift`, says which unshifted sigmas belong to a number of
    steps (`default_sigmas`), how shifted ones become its grid (`_grid`), at which times it calls the model
    (`_model_sigmas`), and makes a `step`. The state is float32 whatever the model's dtype; steps are differences of
    the grid in double precision, since those of float32 times keep four digits.

    Attributes:
        sigmas: (M + 1,) float32 on the CPU, the shifted grid of M steps, falling.
        timesteps: (K,) float32, sigma * num_train_timesteps of each of the K model calls, in order.
        num_inference_steps: M, the number of steps.
        init_noise_sigma: 1: sampling starts from standard normal noise.
    """

    order = 1
    init_noise_sigma = 1.0
    sigmas: torch.Tensor
    timesteps: torch.Tensor
    num_inference_steps: int

    def _start(self) -> None:
        self._shift = float(self.config["shift"])
        self._begin_index: int | None = None
        self._step_index: int | None = None

    @property
    def shift(self) -> float:
        """Alpha of the time shift that `set_timesteps` applies."""
        return self._shift

    def set_shift(self, shift: float) -> None:
        """Use another alpha from the next `set_timesteps` on."""
        self._shift = TimeShift(shift).alpha

    @property
    def step_index(self) -> int | None:
        """Index into `timesteps` of the next `step`; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index into `timesteps` where sampling was told to begin."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this index of `timesteps` instead of finding the first timestep in it."""
        self._begin_index = begin_index

    def default_sigmas(self, num_inference_steps: int) -> list[float]:
        """Unshifted sigmas that belong to this sampler and number of steps, falling from 1."""
        raise NotImplementedError

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Lay the grid.

        Args:
            num_inference_steps: used where `sigmas` is None: the sampler's own grid of that many steps.
            device: of `timesteps`.
            sigmas: unshifted times in [0, 1], falling; they are shifted once, here.

        Raises:
            UserError: neither or an empty grid given, or sigmas not falling within [0, 1].
        """
        if sigmas is None:
            if num_inference_steps is None:
                raise UserError("set_timesteps got neither num_inference_steps nor sigmas; give one of them")
            sigmas = self.default_sigmas(num_inference_steps)
        grid = self._grid(TimeShift(self.shift)(checked_sigmas(sigmas)))
        self._times: list[float] = grid.tolist()
        self.sigmas = grid.to(torch.float32)
        self.timesteps = (self._model_sigmas() * self.config["num_train_timesteps"]).to(device)
        self.num_inference_steps = len(self.sigmas) - 1
        self._step_index = None
        self._begin_index = None

    def index_for_timestep(self, timestep: torch.Tensor | float) -> int:
        """Index of a timestep in `timesteps`; of its last place where it occurs twice, which begins a step.

        Raises:
            UserError: the timestep is not on the grid.
        """
        wanted = torch.as_tensor(timestep, dtype=torch.float32, device=self.timesteps.device)
        places = (self.timesteps == wanted).nonzero()
        if len(places) == 0:
            raise UserError(
                f"timestep {float(wanted):g} is not on the sampler's grid; pass the elements of scheduler.timesteps"
            )
        return int(places[-1])

    def _grid(self, shifted: torch.Tensor) -> torch.Tensor:
        if shifted[-1] == 0:
            raise UserError("sigmas end with 0, which the sampler appends itself; leave it out")
        return torch.cat([shifted, torch.zeros(1, dtype=shifted.dtype)])

    def _model_sigmas(self) -> torch.Tensor:
        return self.sigmas[:-1]

    def _current_index(self, timestep: torch.Tensor | float) -> int:
        """Index of this model call; the next one follows it."""
        if not hasattr(self, "timesteps"):
            raise UserError(f"{type(self).__name__}.step was called before set_timesteps")
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        if self._step_index >= len(self.timesteps):
            raise UserError(f"{type(self).__name__} has made all its {len(self.timesteps)} steps; call set_timesteps")
        return self._step_index


def linear_sigmas_to_zero(num_inference_steps: int) -> list[float]:
    """First N of the N + 1 points from 1 to 0 in equal steps; a sampler appends the 0 itself.

    Raises:
        UserError: fewer than one step.
    """
    if num_inference_steps < 1:
        raise UserError(f"num_inference_steps is {num_inference_steps}; give at least 1")
    return torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64)[:-1].tolist()


def linear_sigmas_to(last_sigma: float, num_points: int) -> list[float]:
    """N points from 1 to `last_sigma` in equal steps.

    Raises:
        UserError: fewer than two points.
    """
    if num_points < 2:
        raise UserError(f"num_inference_steps is {num_points}; this sampler's grid needs at least 2 points")
    return torch.linspace(1, last_sigma, num_points, dtype=torch.float64).tolist()


def checked_sigmas(sigmas: Sequence[float]) -> torch.Tensor:
    """Return unshifted times as a tensor (M,) float64 on the CPU.

    Raises:
        UserError: what is no list of numbers, or not falling within [0, 1].
    """
    try:
        times = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"sigmas is {sigmas!r}; give a list of falling times in [0, 1]") from None
    if times.ndim != 1 or len(times) == 0:
        raise UserError(f"sigmas has shape {tuple(times.shape)}; give a list of falling times in [0, 1]")
    if not (times[0] <= 1 and times[-1] >= 0 and bool((times.diff() < 0).all())):
        raise UserError(f"sigmas run from {times[0]:g} to {times[-1]:g}; give falling times in [0, 1]")
    return times

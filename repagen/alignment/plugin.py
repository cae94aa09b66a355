"""The one interface of alignment terms: hooks around a generator's forward pass, and a loss of what they saw.

    with contextlib.ExitStack() as captures:
        for term in active:
            captures.enter_context(term.capture(model))
        output = model(x_t, t, class_labels=labels, **arguments_of(terms, batch))
    losses = {term.name: term.batch_loss(batch, output) for term in active}

A generator holds no alignment code. A term is attached from outside; its own weights (projectors) are trained and
saved with a run, and left out of released pipelines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from repagen.errors import UserError
from repagen.flow.conditions import Conditions
from repagen.randomness import generator_for

Need = Literal["targets", "attention", "class_token", "teacher"]
"""What a term takes from a batch beside latents, noise, time and labels."""


@dataclass(frozen=True)
class AlignmentBatch:
    """One micro-batch as alignment terms see it.

    Attributes:
        latents: x (B, C, h, w) float32, standardised.
        noise: (B, C, h, w) float32, standard normal; the generator saw x_t = (1 - t) x + t noise.
        t: (B,) float32 in [0, 1]; 0 = data, 1 = noise.
        labels, text, text_mask: as the generator got them, null conditions included; see `Conditions`.
        targets: tokens (B, N, D_k) of each encoder of a `RepresentationAlignment`, from the images behind the latents.
        attention: attention maps (B, heads, N, N) of the encoder layers that an `AttentionAlignment` follows.
        class_token: class token (B, D) of an encoder, from the same images.
        teacher: the generator with averaged weights, in eval mode and without hooks that record.
        generators: purpose => one generator a sample, made anew at every call; what a term draws beyond this batch
            depends on nothing but them.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    labels: torch.Tensor | None = None
    targets: Sequence[torch.Tensor] | None = None
    attention: Sequence[torch.Tensor] | None = None
    class_token: torch.Tensor | None = None
    teacher: nn.Module | None = None
    generators: Callable[[str], Sequence[torch.Generator]] | None = None
    text: torch.Tensor | None = None
    text_mask: torch.Tensor | None = None

    @property
    def conditions(self) -> Conditions:
        """What the generator was told."""
        return Conditions(self.labels, self.text, self.text_mask)

    def need(self, name: Need, term: str) -> Any:
        """The field `name`.

        Raises:
            UserError: it is None.
        """
        value = getattr(self, name)
        if value is None:
            raise UserError(f"alignment: {term} needs {name}, which AlignmentBatch({name}=...) did not get")
        return value

    def draws(self, purpose: str) -> Sequence[torch.Generator]:
        """One generator a sample for a purpose; seeded by PyTorch's running stream where the batch has none."""
        if self.generators is not None:
            return self.generators(purpose)
        seed, device = int(torch.randint(2**62, ()).item()), self.latents.device
        return [generator_for(seed, purpose, index, device=device) for index in range(len(self.latents))]


class AlignmentTerm(nn.Module):
    """A loss on what happens inside a generator, attached from outside.

    A subclass names itself, says what it needs from a batch, which modules it listens to, and computes its loss.

    Attributes:
        name: under which its loss is logged.
        needs: fields of `AlignmentBatch` that `batch_loss` takes.
        feeds_model: whether it has model arguments, for which it needs them in every pass, whatever its weight.
        listens_to: what is kept of a tapped module: its output, or its positional inputs.
    """

    name: ClassVar[str]
    needs: frozenset[Need] = frozenset()
    feeds_model: ClassVar[bool] = False
    listens_to: ClassVar[Literal["output", "input"]] = "output"

    def __init__(self) -> None:
        super().__init__()
        self._record = Record()

    def tapped(self, network: Any) -> Mapping[int, nn.Module]:
        """The modules to listen to, by block number, counted from 1.

        Args:
            network: the generator, unwrapped.

        Raises:
            UserError: the term does not fit the generator.
        """
        raise NotImplementedError

    def batch_loss(self, batch: AlignmentBatch, output: Any) -> torch.Tensor:
        """The loss of the last captured pass, a scalar float32, without its weight.

        Args:
            batch: what the generator was given, and what `needs` names.
            output: what the generator returned.

        Raises:
            UserError: nothing was captured, or the batch lacks what the term needs.
        """
        raise NotImplementedError

    def model_arguments(self, batch: AlignmentBatch) -> dict[str, Any]:
        """Further arguments of the generator's forward pass; asked for before every pass, see `feeds_model`."""
        return {}

    def attach(self, model: nn.Module) -> None:
        """Hook the generator; done once, by the first `capture` at the latest.

        A model that is compiled should be attached before its first compiled forward pass, which otherwise may have
        been traced without the hooks.

        Args:
            model: has `blocks` and `token_grid`; may be wrapped by DistributedDataParallel or `torch.compile`.

        Raises:
            UserError: the term does not fit the generator.
        """
        network = unwrap(model)
        self._record.modules = dict(self.tapped(network))
        self._record.grid = network.token_grid
        for number, module in self._record.modules.items():
            listen(module, self._record, number, self.listens_to)
        if getattr(network, "any_size", False):
            listen(network.patch_embed, self._record, 0, "grid")

    @contextmanager
    def capture(self, model: nn.Module) -> Iterator[None]:
        """Keep what the tapped modules do in the forward pass run inside; of several runs of a block, the last.

        Raises:
            UserError: as `attach`.
        """
        self.attach(model)
        with self._record.recording():
            yield

    def captured(self, block: int) -> Any:
        """What was kept of a block.

        Raises:
            UserError: nothing.
        """
        if block not in self._record.values:
            raise UserError(
                f"alignment: no output of block {block} was captured; run the model inside `with alignment.capture"
                "(model):`, and call alignment.attach(model) before the first pass of a compiled model"
            )
        return self._record.values[block]

    def captured_tokens(self, block: int) -> torch.Tensor:
        """The patch tokens (B, N, D) that a block put out; tokens that a generator appends to them are left out."""
        return self.captured(block)[:, : self._record.num_tokens]


def arguments_of(terms: Iterable[AlignmentTerm], batch: AlignmentBatch) -> dict[str, Any]:
    """The further arguments that terms want the generator to have."""
    return {key: value for term in terms for key, value in term.model_arguments(batch).items()}


# --- taps ----------------------------------------------------------------------------------------------------------


class Record:
    """What taps saw in one forward pass. Copies of a tapped model get an empty record, not this one's tensors.

    Attributes:
        active: whether taps write into it.
        grid: rows and columns of the generator's tokens; of the last pass, in a generator for any size.
        modules: what is listened to, by block number.
        values: what was kept, by block number.
    """

    def __init__(self) -> None:
        self.active = False
        self.grid: tuple[int, int] = (0, 0)
        self.modules: dict[int, Any] = {}
        self.values: dict[int, Any] = {}

    @property
    def num_tokens(self) -> int:
        """Patch tokens of the generator, which lead its sequence."""
        return self.grid[0] * self.grid[1]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Forget what was kept, and keep what happens inside."""
        self.values.clear()
        self.active = True
        try:
            yield
        finally:
            self.active = False

    def __getstate__(self) -> dict[str, Any]:
        return {"active": False, "grid": self.grid, "modules": {}, "values": {}}


TapKind = Literal["output", "input", "grid"]


class _Tap:
    """Forward hook of one module."""

    def __init__(self, record: Record, number: int, kind: TapKind, keeps: bool) -> None:
        self.record = record
        self.number = number
        self.kind = kind
        self.keeps = keeps

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        if not (self.keeps and self.record.active):
            return
        if self.kind == "grid":
            rows, columns = (n // k for n, k in zip(args[0].shape[2:], module.proj.kernel_size, strict=True))
            self.record.grid = (rows, columns)
        else:
            self.record.values[self.number] = output if self.kind == "output" else args


def listen(
    module: nn.Module,
    record: Record,
    number: int,
    kind: TapKind = "output",
    keeps: bool = True,
) -> RemovableHandle | None:
    """Hook a module once, however often it is asked, so that a record keeps something of its passes.

    Args:
        module: to listen to.
        record: that keeps.
        number: under which it does.
        kind: what is kept: its output, its positional inputs, or of a `PatchEmbedding` the grid of tokens.
        keeps: False for a hook that does nothing, see `AttentionAlignment.attach`.

    Returns:
        What removes the hook; None where there was one.
    """
    taps = [hook for hook in module._forward_hooks.values() if isinstance(hook, _Tap)]
    if any(tap.record is record for tap in taps):
        return None
    return module.register_forward_hook(_Tap(record, number, kind, keeps))


def blocks_of(network: Any, numbers: Iterable[int], where: Callable[[int], str]) -> dict[int, Any]:
    """Blocks of a generator by number.

    Args:
        network: has `blocks`.
        numbers: counted from 1.
        where: the name, for messages, of the setting that gave the number at a position.

    Raises:
        UserError: a number that the model does not have.
    """
    depth = len(network.blocks)
    found = {}
    for position, number in enumerate(numbers):
        if not 1 <= number <= depth:
            raise UserError(f"alignment: {where(position)} is {number}, but the model has blocks 1..{depth}")
        found[number] = network.blocks[number - 1]
    return found


def check_width(network: Any, hidden_size: int) -> None:
    """Refuse a generator whose tokens have another width than a projector takes."""
    width = network.config.hidden_size
    if width != hidden_size:
        raise UserError(f"alignment: hidden_size is {hidden_size}, but the model's blocks are {width} wide")


def require_flow(network: Any, term: str) -> None:
    """Refuse a generator of discrete diffusion steps for a term that is stated on the straight path."""
    if getattr(network, "discrete_time", False):
        raise UserError(
            f"alignment: {term} is defined for flow matching, and {type(network).__name__} takes discrete diffusion "
            "steps; leave it out, or train a network of continuous time"
        )


def unwrap(model: Any) -> Any:
    """The generator inside wrappers such as DistributedDataParallel's."""
    while not hasattr(model, "blocks") and hasattr(model, "module"):
        model = model.module
    return model

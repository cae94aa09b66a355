"""CLIPScore and PickScore: how well an image fits its prompt, by a CLIP model of transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from repagen.encoders.files import local_folder, local_weights, read_json
from repagen.encoders.weights import load_pretrained, refuse_not_finite, weights_sha256
from repagen.errors import UserError, refusing
from repagen.evaluation.extractor import ExtractorIdentity, full_float32

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPProcessor

CLIP_CONVENTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cosine": lambda cosines: cosines.mean(),
    "100*max(cos,0)": lambda cosines: 100 * cosines.mean().clamp(min=0),
    "2.5*max(cos,0)": lambda cosines: 2.5 * cosines.clamp(min=0).mean(),
}
"""How the cosines (N,) of a set become the figure: RAEv2; torchmetrics, which clamps the mean; Hessel et al.
(2104.08718, eq. 1), who clamp each image. Hessel et al. also begin every text with "A photo depicts", which is the
caller's to do."""

_TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_IMAGE_PROCESSOR_FILES = (("preprocessor_config.json",), ("processor_config.json",))


@torch.no_grad()
def clip_score(
    model: CLIPModel, processor: CLIPProcessor, images: torch.Tensor | Sequence[torch.Tensor], prompts: Sequence[str]
) -> torch.Tensor:
    """Cosine between the embeddings of each image and its prompt; see `CLIP_CONVENTIONS` for what is reported.

    Args:
        model: both towers; float32 unless figures need not be comparable.
        processor: its tokenizer, and its image processor, which resizes and crops.
        images: uint8 (B, 3, H, W), or B images (3, H, W) of any sizes.
        prompts: B texts; what exceeds the model's limit is cut off, see `truncated_prompts`.

    Returns:
        (B,) float32 in [-1, 1], on the CPU.

    Raises:
        UserError: when images are not uint8 RGB, or there are not as many prompts.
    """
    require_uint8_rgb(images)
    if len(images) != len(prompts) or len(images) == 0:
        raise UserError(f"every image needs its prompt, got {len(images)} images and {len(prompts)} prompts")
    texts = list(dict.fromkeys(prompts))  # several images of one prompt need its embedding once
    inputs = processor(
        text=texts,
        images=[image.cpu() for image in images],
        padding=True,
        truncation=True,
        max_length=text_limit(model, processor),
        return_tensors="pt",
    ).to(model.device)
    with full_float32(model.device):
        output = model(**inputs)
    of_image = torch.tensor([texts.index(prompt) for prompt in prompts], device=model.device)
    return (output.image_embeds.float() * output.text_embeds.float()[of_image]).sum(dim=-1).cpu()


@torch.no_grad()
def pick_score(
    model: CLIPModel, processor: CLIPProcessor, images: torch.Tensor | Sequence[torch.Tensor], prompts: Sequence[str]
) -> torch.Tensor:
    """PickScore (Kirstain et al., 2305.01569, section 4): the cosine times `logit_scale.exp()`, the model's scale.

    Args and errors as for `clip_score`.

    Returns:
        (B,) float32, on the CPU.
    """
    return model.logit_scale.exp().float().cpu() * clip_score(model, processor, images, prompts)


def pick_preferences(scores: torch.Tensor) -> torch.Tensor:
    """Probability that each of several images of one prompt is preferred (2305.01569, section 4).

    Args:
        scores: PickScores (..., K) of K images of one prompt.

    Returns:
        (..., K), summing to 1 over the images.
    """
    return scores.softmax(dim=-1)


def text_limit(model: CLIPModel, processor: CLIPProcessor) -> int:
    """Most tokens of a text that the model reads, begin and end included."""
    config: Any = model.config.text_config
    return min(processor.tokenizer.model_max_length, config.max_position_embeddings)


def truncated_prompts(model: CLIPModel, processor: CLIPProcessor, prompts: Sequence[str]) -> list[int]:
    """Indices of the prompts whose end the model does not see."""
    limit = text_limit(model, processor)
    tokens = processor.tokenizer(list(prompts), verbose=False)["input_ids"]
    return [index for index, ids in enumerate(tokens) if len(ids) > limit]


def require_uint8_rgb(images: torch.Tensor | Sequence[torch.Tensor]) -> None:
    """Refuse images that are not uint8 (3, H, W).

    Raises:
        UserError: naming what was given.
    """
    for image in images:
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            got = f"{str(image.dtype).removeprefix('torch.')} {tuple(image.shape)}"
            raise UserError(
                f"images must be uint8 (3, H, W) each, got {got}; round them with repagen.evaluation.samples.to_uint8"
            )


@dataclass(frozen=True)
class ScoringModel:
    """A CLIP model that scores images, and its identity.

    Attributes:
        model: both towers, float32, in eval mode.
        processor: tokenizer and image processor.
        identity: what stands beside the figure.
    """

    model: CLIPModel
    processor: CLIPProcessor
    identity: ExtractorIdentity


def open_scoring_model(name: str, *, processor: str | None = None, device: torch.device | str = "cpu") -> ScoringModel:
    """Open a CLIP model from a folder, or by its id from the local Hub cache; nothing is downloaded.

    Args:
        name: folder or Hub id of a transformers `CLIPModel`.
        processor: folder or Hub id of its tokenizer and image processor, where they are not beside the model.
        device: where to compute.

    Raises:
        UserError: when files are missing or damaged, or it is another kind of model.
    """
    from transformers import CLIPModel

    folder = local_folder(name)
    config = read_json(folder / "config.json")
    if config.get("model_type") != "clip":
        raise UserError(
            f"{name}: model_type {config.get('model_type')!r} is no CLIP model with both towers; give one, such as "
            "openai/clip-vit-large-patch14"
        )
    weights = local_weights(name)
    # Named, so that no implementation that a config asks for is fetched.
    model = load_pretrained(CLIPModel, weights, name, attn_implementation="sdpa")
    refuse_not_finite(model, weights, name)
    reader = _open_processor(processor or name)
    if len(reader.tokenizer) > model.config.text_config.vocab_size:
        raise UserError(
            f"{processor or name}: the tokenizer has {len(reader.tokenizer)} tokens, model {name} knows "
            f"{model.config.text_config.vocab_size}; give the processor that belongs to it"
        )
    identity = ExtractorIdentity(name, weights_sha256(model), _settings(model, reader, processor))
    return ScoringModel(model.to(device), reader, identity)


def _settings(model: CLIPModel, processor: CLIPProcessor, processor_name: str | None) -> str:
    images: Any = processor.image_processor
    crop = images.crop_size if images.do_center_crop else images.size
    size = "x".join(str(side) for side in dict(crop).values() if side is not None)
    apart = f", processor={processor_name}" if processor_name else ""
    return f"size={size}, {type(images).__name__}, tokens={text_limit(model, processor)}{apart}, dtype=float32"


def _open_processor(name: str) -> CLIPProcessor:
    from transformers import CLIPProcessor

    folder = local_folder(name)
    for what, choices in (("tokenizer", _TOKENIZER_FILES), ("image processor", _IMAGE_PROCESSOR_FILES)):
        # transformers would build an empty tokenizer, or one with settings of its own.
        if not any(all((folder / file).is_file() for file in files) for files in choices):
            wanted = ", or ".join(" with ".join(files) for files in choices)
            raise UserError(
                f"{name}: no {what} ({wanted}); copy it there, or name the folder or id that has it (processor, "
                "--pick-processor)"
            )
    with refusing(f"{name}: tokenizer and image processor cannot be read"):
        return CLIPProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

"""Train the bundled text and vision encoders of shapes: a tiny SigLIP on drawn scenes and their prompts.

    python scripts/train_shapes_encoders.py [--output repagen/data/shapes_encoders] [--seed 0]

About ten minutes on one CPU core. Only combinations of the training split are shown; what is measured on scenes with
unseen combinations is reported beside it. The folder is an ordinary SigLIP checkpoint in float16 with a tokenizer of
whole words.

First the vision tower: pixels of every patch from noisy patch tokens by a throw-away decoder, so that the tokens keep
the detail a decoder needs in a form that survives noise; and the attributes of each quadrant from the mean of its
tokens and from the pooled one. Its patch embedding begins as the principal components of patches, evened out by half:
from random weights the same steps left shapes that nobody could tell apart (54 % of pictures right after decoding).
Trained on attributes alone, a 4x4 grid lost the colours too.

Then the text tower, against the locked vision tower (SigLiT of SigLIP, 2303.15343): sigmoid contrastive loss; each
token names its own word, so that no token collapses; each name of a shape tells its colour, size and quadrant, and the
mean token what stands in which quadrant and which objects there are, so that words are bound to each other. Without
the former a linear probe found the colour that goes with a shape in 69 %, its quadrant in 52 %.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessor, SiglipModel

from repagen.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    QUADRANTS,
    SHAPES,
    SIZES,
    Scene,
    ScenePrompt,
    check_scene,
    draw_scene,
    sample_scene,
)
from repagen.randomness import generator_for

logger = logging.getLogger(__name__)

IMAGE_PX, PATCH_PX, GRID = 32, 8, 4
MEAN = STD = 0.5
TRAIN_SCENES, TEST_SCENES, TEST_SEED = 40_000, 1000, 9
BATCH, WARMUP_STEPS, PEAK_RATE = 64, 100, 1.2e-3
VISION_STEPS, TEXT_STEPS = 4000, 2000
TOKEN_NOISE, COMPONENTS, EVENING = 0.3, 64, 0.5
MAX_WORDS = 24
PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"
STOP_WORDS = ("a", "an", "the", "at", "in")
SPARE_WORDS = ("ring", "star", "diamond", "heart", "orange", "pink", "brown", "tiny", "huge", "centre")
"""In the vocabulary, but never trained: names for what somebody may teach a generator."""
VISION = {
    "image_size": IMAGE_PX, "patch_size": PATCH_PX, "hidden_size": 96, "intermediate_size": 192,
    "num_hidden_layers": 4, "num_attention_heads": 4,
}  # fmt: skip
TEXT = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": MAX_WORDS, "projection_size": VISION["hidden_size"],
}  # fmt: skip
Classes = dict[str, list[Any]]
QUADRANT_CLASSES: Classes = {"shape": [None, *SHAPES], "colour": [None, *COLOURS], "size": [None, *SIZES]}
BOUND_CLASSES: Classes = {
    "colour": [None, *COLOURS],
    "size": [None, *SIZES],
    "quadrant": [None, *QUADRANTS],
}
KINDS = [(shape, colour) for shape in SHAPES for colour in COLOURS]


def make_tokenizer(words: set[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words that passes over articles and the words before a place."""
    vocabulary = [PAD, EOS, UNKNOWN, *sorted((words | set(SPARE_WORDS)) - set(STOP_WORDS))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    stop = Regex(rf"\b({'|'.join(STOP_WORDS)})\b")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(stop, " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, vocabulary.index(EOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, model_max_length=MAX_WORDS,
        padding_side="right", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


class Scenes:
    """Drawn scenes with everything the losses ask for.

    Attributes:
        images: (N, 3, 32, 32) uint8.
        ids: (N, P, 24) tokens of P prompts each; scenes with fewer repeat theirs.
        bindings: attribute => what goes with each token (N, P, 24): 0: the prompt does not say; -1: the token is no
            name of a shape.
        quadrants: attribute => class in each quadrant (N, 4).
        backgrounds: (N,); `kinds`: (N, 24) whether such an object is there; `counts`: objects (N,), from 0.
    """

    def __init__(self, scenes: list[Scene], tokenizer: PreTrainedTokenizerFast) -> None:
        self.scenes = scenes
        self.images = torch.from_numpy(np.stack([draw_scene(scene) for scene in scenes])).permute(0, 3, 1, 2)
        prompts = [scene.prompts() for scene in scenes]
        most = max(map(len, prompts))
        rows = [row[i % len(row)] for row in prompts for i in range(most)]
        flat = tokenize(tokenizer, [prompt.text for prompt in rows])
        self.ids = flat.unflatten(0, (len(scenes), most))
        self.bindings = {
            name: bound.unflatten(0, (len(scenes), most)) for name, bound in _bindings(flat, rows, tokenizer).items()
        }
        self.quadrants = {
            name: torch.tensor([_quadrant_classes(scene, name) for scene in scenes]) for name in QUADRANT_CLASSES
        }
        self.backgrounds = torch.tensor([list(BACKGROUNDS).index(scene.background) for scene in scenes])
        self.kinds = torch.tensor([[kind in {i.kind for i in s.objects} for kind in KINDS] for s in scenes]).float()
        self.counts = torch.tensor([len(scene.objects) - 1 for scene in scenes])

    def pixels(self, chosen: torch.Tensor | slice) -> torch.Tensor:
        """Return normalised pixels."""
        return (self.images[chosen].float() / 255 - MEAN) / STD


def _bindings(
    ids: torch.Tensor, prompts: list[ScenePrompt], tokenizer: PreTrainedTokenizerFast
) -> dict[str, torch.Tensor]:
    """What goes with each token (N, 24) of prompts: their shapes are named in the order of their objects."""
    names = {word for shape in SHAPES for word in (shape, f"{shape}s", f"{shape}es")}
    known = torch.tensor([id for word, id in tokenizer.get_vocab().items() if word in names])
    bound = {name: torch.full_like(ids, -1, dtype=torch.int8) for name in BOUND_CLASSES}
    rows, columns = torch.isin(ids, known).nonzero(as_tuple=True)
    turns = torch.cat([torch.arange(count) for count in rows.bincount().tolist()])
    for row, column, turn in zip(rows.tolist(), columns.tolist(), turns.tolist(), strict=True):
        for name, classes in BOUND_CLASSES.items():
            bound[name][row, column] = classes.index(getattr(prompts[row].objects[turn], name))
    return bound


def _quadrant_classes(scene: Scene, name: str) -> list[int]:
    found = {item.quadrant: getattr(item, name) for item in scene.objects}
    return [QUADRANT_CLASSES[name].index(found.get(quadrant)) for quadrant in QUADRANTS]


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Return tokens (N, 24), padded as SigLIP's."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_WORDS, return_tensors="pt").input_ids


class Objective(nn.Module):
    """Both encoders and the throw-away heads."""

    def __init__(self, vocabulary: int, pad: int) -> None:
        super().__init__()
        text = {**TEXT, "vocab_size": vocabulary, "pad_token_id": pad, "eos_token_id": pad + 1, "bos_token_id": None}
        self.model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
        nn.init.constant_(self.model.logit_scale, math.log(10.0))
        nn.init.constant_(self.model.logit_bias, -10.0)
        self.pad = pad
        width, text_width = VISION["hidden_size"], TEXT["hidden_size"]
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.places = nn.Parameter(0.02 * torch.randn(GRID * GRID, width))
        self.decoder = nn.Sequential(layer, nn.Linear(width, 3 * PATCH_PX**2))
        self.classes = sum(map(len, QUADRANT_CLASSES.values()))
        of_scene = 4 * self.classes + len(BACKGROUNDS) + len(KINDS) + 3
        self.quadrant_head = nn.Linear(width, self.classes)
        self.pooled_head = nn.Linear(width, of_scene)
        self.word_head = nn.Linear(text_width, vocabulary)
        self.scene_head = nn.Linear(text_width, of_scene)
        self.bound_head = nn.Linear(text_width, sum(map(len, BOUND_CLASSES.values())))

    @torch.no_grad()
    def start_from_components(self, pixels: torch.Tensor, generator: torch.Generator) -> None:
        """Embed patches as their principal components, mixed, and let the blocks begin near the identity."""
        patches = _patches(pixels).flatten(0, 1)
        centred = patches - patches.mean(0)
        variances, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
        variances, directions = variances.flip(0)[:COMPONENTS], directions.flip(1)[:, :COMPONENTS]
        scales = variances ** (-EVENING / 2)
        scales = scales / (variances * scales**2).mean().sqrt()
        mixing = torch.linalg.qr(torch.randn(COMPONENTS, COMPONENTS, generator=generator))[0]
        vision, rest = self.model.vision_model, VISION["hidden_size"] - COMPONENTS
        weight = torch.zeros(VISION["hidden_size"], patches.shape[1])
        weight[:COMPONENTS] = mixing @ (scales[:, None] * directions.T)
        vision.embeddings.patch_embedding.weight.copy_(weight.view(-1, 3, PATCH_PX, PATCH_PX))
        vision.embeddings.patch_embedding.bias.copy_(-(weight @ patches.mean(0)))
        places = vision.embeddings.position_embedding.weight.zero_()
        # The remaining channels carry a constant, so that the norm of a token does not hide that of its patch.
        places[:, COMPONENTS:] = torch.randn(rest, generator=generator)
        places[:, COMPONENTS:] += 0.5 * torch.randn(GRID**2, rest, generator=generator)
        for layer in vision.encoder.layers:
            layer.self_attn.out_proj.weight.mul_(0.1)
            layer.mlp.fc2.weight.mul_(0.1)

    def see(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return patch tokens (B, 16, D), normalised without affine, and the pooled token (B, D)."""
        vision = self.model.vision_model
        raw = vision.encoder(inputs_embeds=vision.embeddings(pixels)).last_hidden_state
        return F.layer_norm(raw, raw.shape[-1:]), vision.head(vision.post_layernorm(raw))

    def read(self, ids: torch.Tensor, attend_all: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all tokens (B, 24, D) and the pooled one (B, D); with and without a mask, as different users do."""
        mask = None if attend_all else (ids != self.pad).long()
        output = self.model.text_model(input_ids=ids, attention_mask=mask)
        return output.last_hidden_state, output.pooler_output

    def vision_losses(self, data: Scenes, chosen: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Return the losses of a batch of pictures by name."""
        pixels = data.pixels(chosen)
        tokens, pooled = self.see(pixels)
        sigma = TOKEN_NOISE * torch.rand(len(chosen), 1, 1, generator=generator)
        noisy = tokens + sigma * torch.randn(tokens.shape, generator=generator)
        return {
            "pixels": F.l1_loss(self.decoder(noisy + self.places), _patches(pixels)),
            "quadrants": _quadrant_loss(self.quadrant_head(_quadrant_means(tokens)), data.quadrants, chosen),
            "pooled": self.scene_loss(self.pooled_head(pooled), data, chosen),
        }

    def text_losses(
        self, data: Scenes, seen: torch.Tensor, chosen: torch.Tensor, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Return the losses of a batch of prompts by name; `seen` are the pooled tokens of all pictures."""
        prompt = torch.randint(data.ids.shape[1], (len(chosen),), generator=generator)
        ids = data.ids[chosen, prompt]
        words, pooled = self.read(ids, bool(torch.rand((), generator=generator) < 0.5))
        real = ids != self.pad
        mean = (words * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        return {
            "contrastive": self.sigmoid_loss(seen[chosen], pooled),
            "words": F.cross_entropy(self.word_head(words)[real], ids[real]),
            "bound": self.bound_loss(words, {name: of[chosen, prompt] for name, of in data.bindings.items()}),
            "scene": self.scene_loss(self.scene_head(mean), data, chosen),
        }

    def bound_loss(self, words: torch.Tensor, bindings: dict[str, torch.Tensor]) -> torch.Tensor:
        """What goes with the names of shapes."""
        parts = self.bound_head(words).split([len(classes) for classes in BOUND_CLASSES.values()], -1)
        losses = [
            F.cross_entropy(part.flatten(0, 1), bindings[name].long().flatten(), ignore_index=-1)
            for name, part in zip(BOUND_CLASSES, parts, strict=True)
        ]
        return torch.stack(losses).sum()

    def sigmoid_loss(self, seen: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """SigLIP, algorithm 1."""
        cosines = F.normalize(pooled, dim=-1) @ F.normalize(seen, dim=-1).T
        logits = cosines * self.model.logit_scale.exp() + self.model.logit_bias
        return -F.logsigmoid((2 * torch.eye(len(logits)) - 1) * logits).sum(-1).mean()

    def scene_loss(self, logits: torch.Tensor, data: Scenes, chosen: torch.Tensor) -> torch.Tensor:
        """What is told of the scene; what a prompt leaves out stays at its prior."""
        places, ground, kinds, count = logits.split([4 * self.classes, len(BACKGROUNDS), len(KINDS), 3], -1)
        loss = _quadrant_loss(places.unflatten(-1, (4, self.classes)), data.quadrants, chosen)
        loss = loss + 0.3 * F.cross_entropy(ground, data.backgrounds[chosen])
        loss = loss + 5 * F.binary_cross_entropy_with_logits(kinds, data.kinds[chosen])
        return loss + 0.3 * F.cross_entropy(count, data.counts[chosen])


def _patches(pixels: torch.Tensor) -> torch.Tensor:
    return F.unfold(pixels, PATCH_PX, stride=PATCH_PX).transpose(1, 2)


def _quadrant_means(tokens: torch.Tensor) -> torch.Tensor:
    """Mean token of each quadrant (B, 4, D) of tokens (B, 16, D)."""
    grid = tokens.unflatten(1, (2, GRID // 2, 2, GRID // 2))
    return grid.mean((2, 4)).flatten(1, 2)


def _quadrant_loss(logits: torch.Tensor, targets: dict[str, torch.Tensor], chosen: torch.Tensor) -> torch.Tensor:
    parts = logits.split([len(classes) for classes in QUADRANT_CLASSES.values()], -1)
    losses = [
        F.cross_entropy(part.flatten(0, 1), targets[name][chosen].flatten())
        for name, part in zip(QUADRANT_CLASSES, parts, strict=True)
    ]
    return torch.stack(losses).sum()


WEIGHTS = {
    "pixels": 1.0,
    "quadrants": 0.1,
    "pooled": 0.05,
    "contrastive": 0.5,
    "words": 0.3,
    "bound": 0.5,
    "scene": 0.5,
}


def train(
    parameters: list[nn.Parameter],
    losses_of: Callable[[torch.Tensor, torch.Generator], dict[str, torch.Tensor]],
    steps: int,
    seed: int,
    purpose: str,
) -> list[dict[str, float]]:
    """Train in place; returns the losses every 500 steps."""
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, 1 - step / steps)
    )
    log = []
    for step in tqdm(range(steps), desc=purpose, mininterval=10):
        generator = generator_for(seed, f"shapes_encoders/{purpose}", step)
        losses = losses_of(torch.randint(TRAIN_SCENES, (BATCH,), generator=generator), generator)
        optimizer.zero_grad()
        torch.stack([WEIGHTS[name] * loss for name, loss in losses.items()]).sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 499:
            log.append({"step": step + 1, **{name: round(loss.item(), 4) for name, loss in losses.items()}})
            logger.info("%s", log[-1])
    return log


def train_vision(objective: Objective, data: Scenes, steps: int, seed: int) -> list[dict[str, float]]:
    """Train the vision tower."""
    objective.start_from_components(data.pixels(slice(0, 4000)), generator_for(seed, "shapes_encoders/mixing"))
    heads = (objective.decoder, objective.quadrant_head, objective.pooled_head)
    parameters = [p for part in (objective.model.vision_model, *heads) for p in part.parameters()]
    log = train([*parameters, objective.places], partial(objective.vision_losses, data), steps, seed, "vision")
    with torch.no_grad():
        for parameter in objective.model.vision_model.parameters():
            parameter.copy_(parameter.half())  # what is saved is what the text tower is trained against
    return log


def train_text(objective: Objective, data: Scenes, steps: int, seed: int) -> list[dict[str, float]]:
    """Train the text tower against the locked vision tower."""
    with torch.no_grad():
        parts = torch.arange(TRAIN_SCENES).split(500)
        seen = torch.cat([objective.see(data.pixels(part))[1] for part in tqdm(parts, desc="pictures")])
    heads = (objective.word_head, objective.bound_head, objective.scene_head)
    parameters = [p for part in (objective.model.text_model, *heads) for p in part.parameters()]
    parameters += [objective.model.logit_scale, objective.model.logit_bias]
    return train(parameters, partial(objective.text_losses, data, seen), steps, seed, "text")


@torch.no_grad()
def measure(objective: Objective, fitted: Scenes, test: Scenes) -> dict[str, float]:
    """Return retrieval among full prompts and the accuracy of linear probes, in per cent, and the pixels' PSNR."""
    objective.eval()
    pixels = test.pixels(slice(None))
    tokens, seen = objective.see(pixels)
    ids = test.ids[:, 0]
    words, pooled = objective.read(ids, attend_all=True)
    ranks = F.normalize(pooled, dim=-1) @ F.normalize(seen, dim=-1).T
    own = torch.arange(len(ranks))
    figures = {
        "prompt_to_picture": float((ranks.argmax(1) == own).float().mean()),
        "picture_to_prompt": float((ranks.argmax(0) == own).float().mean()),
        "words": float((objective.word_head(words).argmax(-1) == ids)[ids != objective.pad].float().mean()),
    }
    train_x, test_x = (
        _quadrant_means(part).flatten(0, 1) for part in (objective.see(fitted.pixels(slice(None)))[0], tokens)
    )
    for name in QUADRANT_CLASSES:
        figures[f"probe_{name}"] = linear_probe(
            train_x, fitted.quadrants[name].flatten(), test_x, test.quadrants[name].flatten()
        )
    decoded = objective.decoder(tokens + objective.places)
    error = (decoded - _patches(pixels)) * STD
    pictures = F.fold(decoded.transpose(1, 2), IMAGE_PX, PATCH_PX, stride=PATCH_PX) * STD + MEAN
    right = [check_scene(picture, scene).right for picture, scene in zip(pictures, test.scenes, strict=True)]
    figures["decoded_right"] = sum(right) / len(right)
    figures = {name: round(100 * value, 2) for name, value in figures.items()}
    return {**figures, "psnr_db": round(float(-10 * error.square().mean().log10()), 2)}


@torch.enable_grad()
def linear_probe(train_x: torch.Tensor, train_y: torch.Tensor, test_x: torch.Tensor, test_y: torch.Tensor) -> float:
    """Return the test accuracy of a logistic regression (L2 1e-3, full-batch LBFGS: convex, so without a seed)."""
    mean, std = train_x.mean(0), train_x.std(0) + 1e-6
    train_x, test_x = (train_x - mean) / std, (test_x - mean) / std
    probe = nn.Linear(train_x.shape[1], int(train_y.max()) + 1)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(train_x), train_y) + 1e-3 * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return float((probe(test_x).argmax(1) == test_y).float().mean())


README = """---
license: apache-2.0
library_name: transformers
---
# Encoders of shapes

A SigLIP, {parameters:,} parameters in float16: pictures of {image} px in patches of {patch} (4x4 tokens of width
{width}, {layers} layers), prompts of up to {words} words (tokens of width {text_width}, {text_layers} layers).
Written by `scripts/train_shapes_encoders.py`: {vision_steps} steps of the vision tower, then {text_steps} of the text
tower against the locked vision tower, batch {batch}, seed {seed}, {threads} CPU thread(s), {minutes:.1f} minutes on a
busy machine. The weights are Apache-2.0; no weights or data of others were used.

- Data: {scenes:,} drawn scenes of `repagen.data.shapes` (training split, seed 0) with all their prompts.
- Objectives, vision: pixels from noisy tokens, attributes of quadrants and of the scene. Text: sigmoid contrastive
  loss, own word of each token, what goes with each name of a shape, the scene from the mean token. See the script.
- The tokenizer knows whole words, {vocabulary} of them; it passes over {stop_words}. Unknown words are `<unk>`. Words
  that were never trained, free for what is taught later: {spare_words}.
- It is supervised by what the scenes hold: a stand-in for good frozen encoders, for tests and the quickstart.

Measured by the script on {test} fresh scenes, of seen and of unseen combinations (per cent; PSNR in dB):

| figure | seen | unseen |
| --- | --- | --- |
{rows}

Prompts are full ones, retrieved among {test}. Probes are logistic regressions on a quadrant's mean token, fitted on
seen combinations. `decoded_right` is what the checker says of pictures from the throw-away decoder.

Losses:

{losses}
"""


def _table(log: list[dict[str, float]]) -> str:
    names = list(log[0])
    rows = [" | ".join(names), " | ".join("---" for _ in names)]
    rows += [" | ".join(f"{row[name]:g}" for name in names) for row in log]
    return "\n".join(f"| {row} |" for row in rows)


def write_readme(
    folder: Path, objective: Objective, tokenizer: PreTrainedTokenizerFast, results: list[dict[str, float]],
    logs: list[list[dict[str, float]]], seed: int, minutes: float,
) -> None:  # fmt: skip
    """Write the model card with the measured figures."""
    seen, unseen = results
    text = README.format(
        parameters=objective.model.num_parameters(), image=IMAGE_PX, patch=PATCH_PX, width=VISION["hidden_size"],
        layers=VISION["num_hidden_layers"], words=MAX_WORDS - 1, text_width=TEXT["hidden_size"],
        text_layers=TEXT["num_hidden_layers"], vision_steps=VISION_STEPS, text_steps=TEXT_STEPS, batch=BATCH,
        seed=seed, threads=torch.get_num_threads(), minutes=minutes, scenes=TRAIN_SCENES, vocabulary=len(tokenizer),
        stop_words=", ".join(STOP_WORDS), spare_words=", ".join(SPARE_WORDS), test=TEST_SCENES,
        rows="\n".join(f"| {name} | {seen[name]:g} | {unseen[name]:g} |" for name in seen),
        losses="\n\n".join(map(_table, logs)),
    )  # fmt: skip
    (folder / "README.md").write_text(text, encoding="utf-8")


def save(objective: Objective, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write config, weights, pixel normalisation and tokenizer in the layout of transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    deepcopy(objective.model).half().save_pretrained(folder)
    side = {"height": IMAGE_PX, "width": IMAGE_PX}
    SiglipImageProcessor(size=side, resample=3, image_mean=[MEAN] * 3, image_std=[STD] * 3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Draw, train, measure, save."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("repagen/data/shapes_encoders"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.perf_counter()
    scenes = [sample_scene(0, index) for index in tqdm(range(TRAIN_SCENES), desc="scenes", mininterval=10)]
    texts = {prompt.text for scene in scenes[:5000] for prompt in scene.prompts()}
    tokenizer = make_tokenizer({word for text in texts for word in text.replace(",", " , ").split()})
    data = Scenes(scenes, tokenizer)
    torch.manual_seed(args.seed)
    objective = Objective(len(tokenizer), tokenizer.pad_token_id)
    logs = [train_vision(objective, data, VISION_STEPS, args.seed)]
    save(objective, tokenizer, args.output)  # the vision tower is done, and may be used
    logs.append(train_text(objective, data, TEXT_STEPS, args.seed))
    minutes = (time.perf_counter() - started) / 60
    fitted = Scenes(scenes[:3000], tokenizer)
    results = []
    for part in ("seen", "unseen"):
        fresh = [sample_scene(TEST_SEED, index, combinations=part) for index in range(TEST_SCENES)]
        results.append(measure(objective, fitted, Scenes(fresh, tokenizer)))
        logger.info("%s: %s", part, results[-1])
    save(objective, tokenizer, args.output)
    write_readme(args.output, objective, tokenizer, results, logs, args.seed, minutes)


if __name__ == "__main__":
    main()

"""REPA in a training loop of your own: alignment is attached from outside, the generator does not know of it.

    python examples/align.py [--steps N]

Trains a small SiT on the pixels of handwritten digits, its second block aligned with the frozen digits encoder, and
prints the flow loss and the mean cosine between projected and encoder tokens.
"""

from __future__ import annotations

import argparse

import torch
from torch.nn import functional as F

import repagen
from repagen.alignment import AlignmentTarget
from repagen.data import digits_encoder_path
from repagen.data.digits import digits_to_images, load_digits
from repagen.flow.path import interpolate, velocity_target

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=400)
args = parser.parse_args()

torch.manual_seed(0)
pictures, labels = load_digits("train")
images = digits_to_images(pictures)  # (N, 3, 32, 32) in [0, 1]
pixels = torch.from_numpy(pictures).float()[:, None] / 127.5 - 1  # (N, 1, 8, 8): the "latents" of this example
encoder = repagen.VisionEncoder.from_pretrained(digits_encoder_path())
targets = encoder(images).tokens  # (N, 16, D); REPA keeps the affine of the final norm

model = repagen.SiTTransformer2DModel(
    sample_size=8, patch_size=2, in_channels=1, num_classes=10,
    hidden_size=96, depth=4, num_heads=4, learn_sigma=False,
)  # fmt: skip
model.initialize_weights()  # as published: the model starts at velocity 0
alignment = repagen.RepresentationAlignment(
    model.config.hidden_size, [AlignmentTarget(dim=targets.shape[-1], block=2, projector_dim=128)]
)
optimizer = torch.optim.AdamW([*model.parameters(), *alignment.parameters()], lr=1e-3)
for step in range(args.steps):
    chosen = torch.randint(len(pixels), (64,))
    x, noise, t = pixels[chosen], torch.randn(64, 1, 8, 8), torch.rand(64)
    with alignment.capture(model):
        velocity = model(interpolate(x, noise, t), t, class_labels=torch.from_numpy(labels)[chosen]).sample
    flow_loss = F.mse_loss(velocity, velocity_target(x, noise))
    alignment_loss = alignment.loss([targets[chosen]])
    (flow_loss + 0.5 * alignment_loss).backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 0 or step == args.steps - 1:
        print(f"step {step:4d}  flow loss {flow_loss:.3f}  patch cosine {-alignment_loss:.3f}")

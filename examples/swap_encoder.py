"""The same autoencoder over another frozen encoder: only the encoder's name changes.

    python examples/swap_encoder.py [--encoder FOLDER_OR_HUB_ID ...] [--steps N]

Trains one small decoder for each encoder on handwritten digits and compares the reconstructions. By default the
bundled digits encoder is set against a MAE of the same size with random weights, made here, so that nothing is
downloaded (about a minute on two CPU cores). Reconstruction favours the random one: a mixing of pixels loses little,
features trained to tell digits apart lose what they do not need. What such features give a generator is the other half
of the story. With access to the Hub, try `--encoder facebook/dinov2-base`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import ViTImageProcessor, ViTMAEConfig, ViTMAEModel

import repagen
from repagen.data import digits_encoder_path
from repagen.data.digits import digits_to_images, load_digits

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--encoder", nargs="*", default=[])
parser.add_argument("--steps", type=int, default=250)
args = parser.parse_args()


def make_random_mae(folder: str) -> str:
    """Write a tiny MAE with random weights in the layout of the Hub."""
    torch.manual_seed(0)
    config = ViTMAEConfig(
        image_size=32, patch_size=8, hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=192
    )
    ViTMAEModel(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def reconstruction_error(encoder: str | Path) -> float:
    """Train a small decoder and return its mean absolute error on held-out digits."""
    torch.manual_seed(0)
    sizes = {
        "decoder_hidden_size": 128,
        "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 256,
    }
    autoencoder = repagen.RepresentationAutoencoder.from_encoder(
        encoder, decoder=sizes, image_size=32, decoder_patch_size=8, noise_tau=0.2
    )
    images = digits_to_images(load_digits("train")[0])
    optimizer = torch.optim.AdamW(autoencoder.decoder.parameters(), lr=2e-3)
    for _ in range(args.steps):
        batch = images[torch.randint(len(images), (64,))]
        loss = (autoencoder.decode(autoencoder.training_latents(batch)).sample - batch).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held_out = digits_to_images(load_digits("validation")[0])
    with torch.no_grad():
        return (autoencoder(held_out).sample - held_out).abs().mean().item()


with tempfile.TemporaryDirectory() as folder:
    for encoder in args.encoder or [digits_encoder_path(), make_random_mae(folder)]:
        print(f"{encoder}: mean absolute error {reconstruction_error(encoder):.4f}")

"""Train a text-to-image generator: accelerate launch train/text_to_image.py --config NAME_OR_PATH [key=value ...]."""

from repagen.errors import run_as_program
from repagen.training.text_to_image import main

if __name__ == "__main__":
    run_as_program(main)

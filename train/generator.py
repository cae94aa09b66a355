"""Train a generator: accelerate launch train/generator.py --config NAME_OR_PATH [key=value ...]."""

from repagen.errors import run_as_program
from repagen.training.generator import main

if __name__ == "__main__":
    run_as_program(main)

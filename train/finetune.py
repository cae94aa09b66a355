"""Fine-tune a pipeline: `accelerate launch train/finetune.py --config NAME_OR_PATH pipeline=FOLDER [...]`."""

from repagen.errors import run_as_program
from repagen.training.finetune import main

if __name__ == "__main__":
    run_as_program(main)

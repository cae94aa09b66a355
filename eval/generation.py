"""`repagen evaluate generation` on several processes.

accelerate launch eval/generation.py --model PATH --reference PATH ...
"""

from repagen.errors import run_as_program
from repagen.evaluation.command import launched

if __name__ == "__main__":
    run_as_program(launched("generation"))

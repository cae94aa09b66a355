"""`repagen evaluate reconstruction` on several processes.

accelerate launch eval/reconstruction.py --autoencoder PATH --data PATH ...
"""

from repagen.errors import run_as_program
from repagen.evaluation.command import launched

if __name__ == "__main__":
    run_as_program(launched("reconstruction"))

"""Samples pipelines that carry their own code; run as a program, in an environment that lacks repagen.

python -I -S sample_places.py SITE_PACKAGES < jobs.json
"""

from __future__ import annotations

import json
import sys
from typing import Any

# Arguments of a draw that is cheap and guided, and names a class or gives prompts.
CALL = {"num_inference_steps": 3, "guidance_scale": 2.0}
CLASSES = {"class_labels": ["golden retriever", 2]}
PROMPTS = {"prompt": ["a red cube", "ein Würfel"], "negative_prompt": "a dog"}


def draw(pipe: Any, **changes: Any) -> dict[str, Any]:
    """Latents (2, C, h, w) and the pictures' values in 0..255, of one seed."""
    import numpy as np
    import torch

    def call(output_type: str) -> Any:
        asked = PROMPTS if "text_encoder" in pipe.components else CLASSES
        return pipe(
            **{**CALL, **asked, **changes}, generator=torch.Generator().manual_seed(7), output_type=output_type
        ).images

    pipe.set_progress_bar_config(disable=True)
    pictures = np.stack([np.asarray(picture) for picture in call("pil")])
    return {"latents": call("latent"), "pictures": torch.from_numpy(pictures)}


def main() -> None:
    sys.path.append(sys.argv[1])
    import importlib.util

    assert importlib.util.find_spec("repagen") is None
    from diffusers import DiffusionPipeline
    from safetensors.torch import save_file

    classes = []
    for job in json.load(sys.stdin):
        pipe = DiffusionPipeline.from_pretrained(job["place"], trust_remote_code=True, **job["options"])
        save_file(draw(pipe), job["output"])
        classes.append({name: type(part).__module__ for name, part in pipe.components.items()})
    assert "repagen" not in sys.modules
    absent = [name for name in ("transformers", "peft", "timm") if importlib.util.find_spec(name) is None]
    sys.stdout.write(json.dumps({"classes": classes, "absent": absent}))


if __name__ == "__main__":
    main()

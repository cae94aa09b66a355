"""The classes that a pipeline's components may have.

diffusers compares components with the annotations of a pipeline's constructor when it loads one or makes one from
another, so they name every class.
"""

from __future__ import annotations

from typing import TypeAlias

from diffusers import AutoencoderKL, AutoencoderRAE, DDIMScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from repagen.models.autoencoder_pixel import PixelAutoencoder
from repagen.models.autoencoder_representation import RepresentationAutoencoder
from repagen.models.autoencoder_svg import SVGAutoencoder
from repagen.models.transformer_ddt import DDTTransformer2DModel
from repagen.models.transformer_dit import DDPMDiTTransformer2DModel
from repagen.models.transformer_ditdh import DiTDHTransformer2DModel
from repagen.models.transformer_elt import ELTTransformer2DModel
from repagen.models.transformer_lightningdit import LightningDiTTransformer2DModel
from repagen.models.transformer_raev2 import RAEv2Transformer2DModel
from repagen.models.transformer_sit import SiTTransformer2DModel
from repagen.schedulers.euler_maruyama import FlowMatchEulerMaruyamaScheduler
from repagen.schedulers.euler_truncated import FlowMatchEulerTruncatedScheduler
from repagen.schedulers.heun import FlowMatchHeunScheduler

Transformer: TypeAlias = (
    SiTTransformer2DModel
    | DDPMDiTTransformer2DModel
    | LightningDiTTransformer2DModel
    | DiTDHTransformer2DModel
    | RAEv2Transformer2DModel
    | DDTTransformer2DModel
    | ELTTransformer2DModel
)

Autoencoder: TypeAlias = RepresentationAutoencoder | SVGAutoencoder | PixelAutoencoder | AutoencoderKL | AutoencoderRAE

Scheduler: TypeAlias = (
    FlowMatchEulerDiscreteScheduler
    | FlowMatchEulerTruncatedScheduler
    | FlowMatchHeunScheduler
    | FlowMatchEulerMaruyamaScheduler
    | DDPMScheduler
    | DDIMScheduler
)

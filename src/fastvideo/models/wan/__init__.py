"""The Wan 2.1 video transformer, with parameter names equal to those of diffusers' `WanTransformer3DModel`.

Model: Wan 2.1 (arXiv 2503.20314). Video Sparse Attention and its gate: arXiv 2505.13389.
"""

from fastvideo.models.wan.config import WanConfig
from fastvideo.models.wan.transformer import WanTransformer3DModel

__all__ = ["WanConfig", "WanTransformer3DModel"]

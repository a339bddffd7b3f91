"""The layers of a hybrid KDA model. Parameters carry the names of the released Kimi-Linear checkpoint."""

from .nn.cache import KDACache, MLACache
from .nn.feed_forward import MixtureOfExperts, SwiGLU
from .nn.kda import KimiDeltaAttention
from .nn.mla import NoPEMultiLatentAttention
from .nn.modules import GatedRMSNorm, ShortConvolution

__all__ = [
    "GatedRMSNorm",
    "KDACache",
    "KimiDeltaAttention",
    "MLACache",
    "MixtureOfExperts",
    "NoPEMultiLatentAttention",
    "ShortConvolution",
    "SwiGLU",
]

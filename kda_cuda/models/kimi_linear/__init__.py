"""Kimi Linear as released: configuration, model and checkpoints."""

from .config import KimiLinearConfig
from .model import KimiLinearForCausalLM

__all__ = ["KimiLinearConfig", "KimiLinearForCausalLM"]

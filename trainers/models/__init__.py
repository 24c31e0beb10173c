"""The two model families: `ModelConfig` in, `initialize(seed)`, tokens and targets to a loss."""

from trainers.config import ModelConfig
from trainers.models.gpt2 import GPT2
from trainers.models.llama import Llama

Model = GPT2 | Llama


def build(config: ModelConfig) -> Model:
    """The model that `config.family` names, not yet initialized."""
    return Llama(config) if config.family == "llama" else GPT2(config)

"""gptjax: a JAX/Flax GPT research codebase."""

__version__ = "0.1.0"

"""t5lab: T5, GPT and BERT style Transformers in JAX, trained, evaluated and used from one codebase."""

__version__ = '0.1.0'

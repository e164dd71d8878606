"""One file per architecture. A model's configuration says which model it is."""

from jaxvram.models.gpt2 import GPT2, GPT2Config

MODELS = {"gpt2": (GPT2, GPT2Config)}

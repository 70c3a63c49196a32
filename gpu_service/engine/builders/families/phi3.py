"""`phi3`: Phi 3."""

from transformers import Phi3Config, Phi3ForCausalLM

CONFIG_CLASS = Phi3Config
MODEL_CLASS = Phi3ForCausalLM

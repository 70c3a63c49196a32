"""`qwen2`: Qwen 2 and 2.5."""

from transformers import Qwen2Config, Qwen2ForCausalLM

CONFIG_CLASS = Qwen2Config
MODEL_CLASS = Qwen2ForCausalLM

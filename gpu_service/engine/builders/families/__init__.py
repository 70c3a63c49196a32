"""One module a model family:

`CONFIG_CLASS` and `MODEL_CLASS`, both of transformers itself, so no remote code can run.
"""

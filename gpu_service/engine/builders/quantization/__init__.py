"""One module a quantization:

`IS_QUANTIZED`, `build_config(*, double_quantization, compute_dtype)`, `count_quantized(model)`.
"""

"""One module a training method.

Each has `TRAINS_ADAPTER`, `base_dtype(compute_dtype)`, `prepare_base(model)` (once, when the base was loaded),
`attach(base, base_model, hyperparameters)` (what is trained), `count_covered(model)` and `detach(model)` (the clean
base, or None when nothing of it can stay).
"""

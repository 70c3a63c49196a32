"""The fast path's model without transformers, PEFT, bitsandbytes and accelerate, whose imports take longer than a load.

Same names, same tensors, same first weights as theirs, and none of their forward passes: what needs one (samples,
answers, exports) has the libraries make the model over the same tensors (`promotion`). Imports none of them.
"""

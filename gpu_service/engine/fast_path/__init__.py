"""The fast path: LoRA over a frozen base of a Llama-like family on flat packed tokens, without autograd inside.

One forward and one backward pass, written by hand over fused weights, take the place of transformers' and PEFT's
modules while a job trains and is measured. Those modules stay what is saved, sampled from and put back on the shelf:
the trained tensors are views of one flat buffer, under PEFT's names. Which jobs come here is the plan's decision
(`domain.trainer`); what the plan sent here and cannot be trained here is refused, never trained otherwise.
"""

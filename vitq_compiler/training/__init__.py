"""Training of a quantized part of a network towards what the float network computes; torch is imported when it begins.

`learned` holds what is trained, `rounding_styles` how a weight finds its codes, `objective` the error of one batch, `losses` what
counts as one, `loop` the optimizer, and `windows` which part of a network is trained at a time.
"""

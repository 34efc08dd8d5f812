"""One target per file: what it can take, and the form in which it runs a quantized graph fastest."""

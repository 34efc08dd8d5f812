"""vitq: compiles a vision transformer exported to ONNX into an integer graph."""

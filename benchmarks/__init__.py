"""Accuracy, latency, compile time and memory, against ONNX Runtime's own quantizers. Run as ``python -m benchmarks``."""

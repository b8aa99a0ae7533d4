"""From a scheduled program to ONNX."""

"""ONNX models as input: read and checked, brought to one opset, and imported as a program."""

"""Running and checking compiled models in ONNX Runtime."""

if __name__ != "tncompile.runtime":
    raise ImportError(f"import tncompile.runtime, not {__name__}: a second copy would not be the one in use")

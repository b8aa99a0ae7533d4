"""TorchScript made traceable: its graph is run node by node in Python, so that torch.export sees plain operators."""

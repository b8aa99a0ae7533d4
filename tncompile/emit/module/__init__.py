"""A program as a PyTorch module that can be trained."""

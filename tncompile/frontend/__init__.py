"""From a file or a module to a program: loading, tracing, import of torch.export graphs."""

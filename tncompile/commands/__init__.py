"""Commands of the command line, one a module: ``parser()`` and ``run(options)``. Their heavy imports are lazy."""

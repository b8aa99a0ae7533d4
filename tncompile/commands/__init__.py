"""Commands of the command line, a file each: `parser()` and `run(options)`."""

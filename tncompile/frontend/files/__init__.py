"""Model files: one module for each kind, and what they share. Nothing in a file is run unless the user trusts it."""

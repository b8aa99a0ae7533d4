"""What a contraction costs, in seconds on the target, and the cheapest way to run one along a given tree."""

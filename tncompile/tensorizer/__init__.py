"""Dense weights replaced by tensor formats, under a budget."""

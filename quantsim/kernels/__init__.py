"""What a lowered graph runs: edges that are stored as integers, and products of integers."""

"""All that other programs read, and the only home of their conventions."""

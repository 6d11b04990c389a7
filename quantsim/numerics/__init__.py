"""Pure tensor functions: every formula once, with its source."""

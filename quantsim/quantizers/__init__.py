"""State around the numerics: ranges, how they are estimated, and when they are used."""

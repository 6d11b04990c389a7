"""Published checkpoints: what was measured, with hashes and provenance; and samples of the tasks, written for this project."""

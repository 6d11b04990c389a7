"""Programs: evaluate a published W8A8 checkpoint, or train one. Each recipe is a file of settings, each program a few small modules."""

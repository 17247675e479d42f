"""One module per paper: its recipe, and the objectives that nobody else needs."""

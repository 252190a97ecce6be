"""Draw a run for people: one page that works offline, a model card, a page of token rewards."""

"""Draw a run for people: one page that works offline, and a model card."""

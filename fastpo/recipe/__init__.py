"""Read recipes and flags, and check them before anything is loaded."""

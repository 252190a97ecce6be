"""Say what a training step needs of memory and time, before anything is loaded."""

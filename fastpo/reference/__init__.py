"""Supply a reference's numbers from a live model, a store on disk, or a moving copy."""

"""Where a reference's numbers come from: a live model, a store on disk, or a moving copy."""

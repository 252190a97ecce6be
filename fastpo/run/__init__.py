"""Know a run's folder: what lies in it, whose it is, and what its files say."""

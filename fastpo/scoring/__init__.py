"""Score responses and tokens with a model that is not trained."""

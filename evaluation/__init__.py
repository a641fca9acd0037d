"""What measures a model. Knows nothing of stages and recipes: models, texts and items in, numbers out."""

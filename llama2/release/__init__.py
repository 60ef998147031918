"""What leaves a recipe: the run report and its reckoning of energy and carbon."""

"""The stages of the chain, a module each: `run(recipe, run)` does the work and returns the summary's figures."""

"""`rlhf label`: a person compares two responses at a time in the terminal; the reward stage reads what is preferred."""

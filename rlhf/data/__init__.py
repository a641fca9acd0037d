"""Reading data: files into checked rows, rows into texts, conversations, comparisons and prompts, tokens into rows."""

"""Cut photographs into crops and decide which crops are worth keeping."""

"""Ways of training: each turns micro-batches into updates of its engines."""

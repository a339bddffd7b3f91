"""One sequence over many ranks: who has which tokens, what ranks exchange, and the op on top of it."""

"""How a round reaches the clients."""

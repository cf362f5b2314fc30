"""How the tokens of a packed row see each other, and no others."""

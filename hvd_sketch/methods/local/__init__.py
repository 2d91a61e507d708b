"""Ranks that step on their own and meet now and then, by an exchange of how far each went."""

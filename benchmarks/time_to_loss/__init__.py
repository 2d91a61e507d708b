"""How long each method trains until it has the loss that dense training reaches."""

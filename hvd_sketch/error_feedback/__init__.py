"""Error feedback that looks ahead: gradients are taken where what is unsent has been applied."""

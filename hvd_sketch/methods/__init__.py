"""Published methods that need more than an exchange of gradients: local steps, gossip."""

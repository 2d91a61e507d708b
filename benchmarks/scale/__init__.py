"""A model of what an exchange takes, fitted to measured rows, for clusters that are not at hand."""
